"""Batches of a token dataset for training: shuffled, for ranks and workers, resumable at any batch.

    stream = TokenStream(TokenDataset("tokens/"), batch_size=256, rank=rank, world=world, num_workers=4)
    for batch in stream:                          # endless; batch.indices is int64 (B, N, K)
        ...                                       # a step; on saving: stream.state_dict()

Which row stands at which position is a function of (seed, position) alone. So a state is one number and the names of
the order; it belongs to no rank, and may be loaded by another number of ranks, workers, or rows per batch. `TokenFeed`
is what a Trainer reads; `TokenStream` is the same feed for a loop of one's own, with a state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset, check_dataset
from qlip.archive.dataset.labelled import LabelledTokens
from qlip.archive.dataset.layout import ROW_GROUP, digest
from qlip.archive.dataset.mirrored import FAULT, true_texts
from qlip.archive.dataset.parquet_reader import Numbers
from qlip.data.loader.batch import PerSample, SampleBatch, SkippedSample
from qlip.data.loader.feed import PositionFeed, State, check_layout
from qlip.data.loader.sampler import BlockShuffle, Mixture, Order
from qlip.errors import QLIPError
from qlip.runtime.rng import hash_int

Shuffle = Literal["blocks", "full", "none"]
NAME = "tokens"


@dataclass
class TokenBatch(SampleBatch):
    """B rows of a dataset.

    Attributes:
        indices: int64 (B, N, K); a list of (N, K) where the dataset has no grid of its own.
        rows: int64 (B,), their numbers in the dataset.
        epochs: int64 (B,), the epoch that each belongs to.
        keys: the images' names.
        captions, labels: with `captions`; else None.
        class_ids: int64 (B,), with `class_ids`; else None.
        embeddings: float16 (B, E), with `embeddings`; else None.
    """

    indices: PerSample[Tensor | list[Tensor]]
    rows: PerSample[Tensor]
    epochs: PerSample[Tensor]
    keys: PerSample[list[str]]
    captions: PerSample[list[tuple[str, ...]] | None] = None
    labels: PerSample[list[str | None] | None] = None
    class_ids: PerSample[Tensor | None] = None
    embeddings: PerSample[Tensor | None] = None


class TokenFeed(PositionFeed[TokenBatch]):
    """Feed of a token dataset: each row, or image, exactly once per epoch over all ranks and workers.

    Args:
        dataset: to read.
        batch_size: rows per batch, of all ranks together; a batch may cross the border of an epoch.
        shuffle: ``blocks``, row groups in a random order and rows mixed among `window` of them, so that neighbours are
            read together; ``full``, a random permutation of all rows, for data in memory or on a fast disk; ``none``.
        window: row groups (of up to 1,024 rows) mixed with each other.
        seed: of the order.
        num_workers: reading processes; 0 reads in this one.
        prefetch: batches that each worker keeps ready.
        epochs: epochs until the feed ends, its last batch smaller, maybe empty for a rank; None is endless.
        captions: read captions and labels too. A mirror image never comes with a caption or label that names a side
            (`qlip.archive.dataset.mirrored`): the image itself comes instead, and if it is not there, none.
        embeddings: read embeddings too.
        class_ids: read the ids of the labels too, see `LabelledTokens`; mirror images as with `captions`.
        one_view: of the views of an image, draw one per epoch by seed, epoch and image; an epoch is each image once.

    Raises:
        QLIPError: no row, numbers that make no sense, or captions or embeddings that the dataset was made without.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        shuffle: Shuffle = "blocks",
        window: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        prefetch: int = 4,
        epochs: int | None = None,
        captions: bool = False,
        embeddings: bool = False,
        class_ids: bool = False,
        one_view: bool = False,
    ) -> None:
        where = check_dataset(dataset).layout.address
        if not len(dataset):
            raise QLIPError(f"{where}: no row to train on")
        if shuffle not in ("blocks", "full", "none") or window < 1 or (epochs is not None and epochs < 1):
            raise QLIPError(
                f"shuffle {shuffle!r}, window {window}, epochs {epochs}: need blocks, full or none, and at least 1 each"
            )
        check_layout(batch_size, 0, num_workers)
        if captions:
            dataset.captions_and_labels([])
        if embeddings:
            dataset.embeddings([])
        self.dataset = dataset
        identity: dict[str, Any] = {
            "seed": seed,
            "shuffle": shuffle,
            "window": window if shuffle == "blocks" else None,
            "dataset": digest(dataset.entries),
        }
        views = _views_per_image(dataset) if one_view else 1
        if one_view:
            identity["one_view"] = True
        self.samples_per_epoch = len(dataset) // views
        end = None if epochs is None else epochs * self.samples_per_epoch
        labelled = LabelledTokens(dataset) if class_ids else None
        reader = _RowReader(dataset, shuffle, window, seed, captions, embeddings, labelled, views)
        super().__init__(reader.batch, identity, batch_size, num_workers, prefetch, end=end, name=where)

    def position(self, state: State | None) -> int:
        """See `PositionFeed.position`."""
        if state is not None and state.get("dataset") != self.identity["dataset"]:
            raise QLIPError(f"{self.name}: the saved state is of another dataset, or of one before parts were added")
        return super().position(state)


class TokenStream:
    """A rank's batches of a token dataset, with a state dict.

    Every rank gets its contiguous share of every batch, as equal as possible. Iterating begins where the stream stands:
    at the start, after a loaded state, or where the last loop left it.

    Args:
        dataset, batch_size: see `TokenFeed`.
        rank, world: this process among those that share each batch.
        options: further arguments of `TokenFeed`, such as `seed` or `epochs`.

    Raises:
        QLIPError: as `TokenFeed`, or fewer rows per batch than ranks.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, *, rank: int = 0, world: int = 1, **options: Any
    ) -> None:
        self.rank, self.world = rank, world
        self._position = 0
        self._feed = TokenFeed(dataset, batch_size, **options)
        check_layout(batch_size, 0, self._feed.num_workers, rank, world)

    @property
    def dataset(self) -> TokenDataset:
        """The dataset that it reads."""
        return self._feed.dataset

    @property
    def position(self) -> int:
        """Number of rows that all ranks together have had."""
        return self._position

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self._position // self._feed.samples_per_epoch

    def __iter__(self) -> Iterator[TokenBatch]:
        with closing(self._feed.open(self.state_dict(), rank=self.rank, world=self.world)) as opened:
            for batch, state in opened:
                self._position = state["position"]
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """State after the batch that was handed out last, as JSON; equal on all ranks."""
        return self._feed.state(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a state, from the next loop on.

        Raises:
            QLIPError: it is of another dataset or of another order.
        """
        self._position = self._feed.position(state)


def _views_per_image(dataset: TokenDataset) -> int:
    """Return the number of rows per image. Raises QLIPError: it differs from image to image."""
    views = dataset.info.views.count
    if views is None or any(entry.rows % views for entry in dataset.entries):
        raise QLIPError(f"{dataset.layout.address}: its images have different numbers of views; read all views")
    return views


@dataclass(frozen=True)
class _RowReader:
    """Reads the rows at positions of a shuffled dataset."""

    dataset: TokenDataset
    shuffle: Shuffle
    window: int
    seed: int
    captions: bool
    embeddings: bool
    labelled: LabelledTokens | None = None
    views: int = 1

    @cached_property
    def _order(self) -> Mixture:
        size = len(self.dataset) // self.views
        orders = {"blocks": self._blocks, "full": None, "none": lambda epoch: _InOrder()}
        return Mixture([NAME], [size], [1.0], self.seed, [orders[self.shuffle]])

    def _blocks(self, epoch: int) -> Order:
        runs = [entry.rows // self.views for entry in self.dataset.entries]
        return BlockShuffle(runs, max(1, ROW_GROUP // self.views), self.window, self.seed, "order", NAME, epoch)

    def batch(self, positions: Numbers) -> TokenBatch:
        """Read the rows at positions, int64 (B,)."""
        _, epochs, rows = self._order.places(positions)
        data = self.dataset
        if self.views > 1:
            rows = self._draw_views(epochs, rows)
        captions, labels, skipped = None, None, list[SkippedSample]()
        if self.captions or self.labelled is not None:
            found = true_texts(data, rows, by_label=self.labelled is not None)
            kept = np.flatnonzero(found.usable)
            skipped = [SkippedSample(key, data.layout.address, FAULT) for key in data.keys(rows[~found.usable])]
            rows, epochs = found.rows[kept], epochs[kept]
            if self.captions:
                captions, labels = [found.captions[one] for one in kept], [found.labels[one] for one in kept]
        return TokenBatch(
            indices=data.batch(rows) if data.info.grid is not None else data.indices(rows),
            rows=torch.from_numpy(rows),
            epochs=torch.from_numpy(epochs),
            keys=data.keys(rows),
            captions=captions,
            labels=labels,
            class_ids=None if self.labelled is None else self.labelled.class_ids(rows),
            embeddings=torch.from_numpy(data.embeddings(rows)) if self.embeddings else None,
            skipped=skipped,
        )

    def _draw_views(self, epochs: Numbers, images: Numbers) -> Numbers:
        """Return the row of one view of each image."""
        pairs = zip(epochs.tolist(), images.tolist(), strict=True)
        drawn = [hash_int(self.seed, "view", epoch, image) % self.views for epoch, image in pairs]
        rows = images * self.views + np.array(drawn, dtype=np.int64)
        stored = [] if not len(rows) else self.dataset.groups.take(rows, "view").to_pylist()
        if stored != drawn:
            raise QLIPError(
                f"{self.dataset.layout.address}: the views of its images do not lie together, as in a sample of rows;"
                " read all views"
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}


class _InOrder:
    """The order of the dataset itself."""

    def __call__(self, index: int) -> int:
        return index

    def many(self, indices: Numbers) -> Numbers:
        """Map an array of indices to itself."""
        return indices
