"""A token dataset to train from: shuffled batches for ranks and workers that go on exactly where they were.

    stream = TokenStream(TokenDataset("tokens/"), batch_size=256, rank=rank, world=world, num_workers=4)
    for batch in stream:                          # endless; batch.indices is int64 (B, N, K)
        ...                                       # a step; on saving: stream.state_dict()

Which row stands at which position of the stream is a function of (seed, position) alone. So the state is one number,
belongs to no rank, and may be loaded by another number of ranks, workers, or rows a batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import ROW_GROUP
from qlip.archive.dataset.parquet_reader import Numbers
from qlip.data.loader.sampler import BlockOrder, Mixture, Order
from qlip.data.loader.stream import check_layout, share_of
from qlip.data.loader.workers import in_turn
from qlip.errors import QLIPError

Shuffle = Literal["blocks", "full", "none"]
NAME = "tokens"


@dataclass
class TokenBatch:
    """B rows of a dataset.

    Attributes:
        indices: int64 (B, N, K); a list of (N, K) where the dataset has no grid of its own.
        rows: int64 (B,), their numbers in the dataset.
        epochs: int64 (B,), the pass that each belongs to.
        keys: the images' names.
        captions, labels: with `words`; else None.
        embeddings: float16 (B, E), with `embeddings`; else None.
    """

    indices: Tensor | list[Tensor]
    rows: Tensor
    epochs: Tensor
    keys: list[str]
    captions: list[tuple[str, ...]] | None = None
    labels: list[str | None] | None = None
    embeddings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Reading:
    """What a worker needs to make any batch of the stream."""

    dataset: TokenDataset
    shuffle: Shuffle
    window: int
    seed: int
    batch_size: int
    words: bool
    embeddings: bool
    start: int = 0
    end: int | None = None
    rank: int = 0
    world: int = 1

    @cached_property
    def _order(self) -> Mixture:
        size = len(self.dataset)
        orders = {"blocks": self._blocks, "full": None, "none": lambda epoch: _AsItIs()}
        return Mixture([NAME], [size], [1.0], self.seed, [orders[self.shuffle]])

    def _blocks(self, epoch: int) -> Order:
        runs = [entry.rows for entry in self.dataset.entries]
        return BlockOrder(runs, ROW_GROUP, self.window, self.seed, "order", NAME, epoch)

    def items(self, worker: int, workers: int) -> Iterator[TokenBatch]:
        """The batches of one worker."""
        for first in itertools.count(self.start + worker * self.batch_size, workers * self.batch_size):
            if self.end is not None and first >= self.end:
                return
            yield self.batch(first)

    def batch(self, first: int) -> TokenBatch:
        """This rank's share of the batch that begins at a position."""
        size = self.batch_size if self.end is None else min(self.batch_size, self.end - first)
        begin, end = share_of(size, self.rank, self.world)
        _, epochs, rows = self._order.places(torch.arange(first + begin, first + end).numpy())
        data = self.dataset
        captions, labels = data.words(rows) if self.words else (None, None)
        return TokenBatch(
            indices=data.batch(rows) if data.info.grid is not None else data.indices(rows),
            rows=torch.from_numpy(rows),
            epochs=torch.from_numpy(epochs),
            keys=data.keys(rows),
            captions=captions,
            labels=labels,
            embeddings=torch.from_numpy(data.embeddings(rows)) if self.embeddings else None,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}


class TokenStream:
    """Batches of a dataset, each row exactly once an epoch over all ranks and workers.

    Every rank gets its contiguous share of every batch, as equal as it goes; a batch may cross the border of an epoch.
    Iterating begins where the stream stands: at the start, after a loaded state, or where the last loop left it.

    Args:
        dataset: to read.
        batch_size: rows a batch, of all ranks together.
        shuffle: ``blocks``, row groups in a random order and rows mixed among `window` of them, so that neighbours are
            read together; ``full``, a random permutation of all rows, for data in memory or on a fast disk; ``none``.
        window: row groups (of up to 1,024 rows) mixed with each other.
        seed: of the order.
        rank, world: this process among those that share each batch.
        num_workers: reading processes; 0 reads here.
        prefetch: batches that each worker keeps ready.
        epochs: passes until the stream ends, its last batch smaller, maybe empty for a rank; None is endless.
        words: captions and labels too.
        embeddings: these too.

    Raises:
        QLIPError: no row, numbers that make no sense, or words or embeddings that the dataset was made without.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        shuffle: Shuffle = "blocks",
        window: int = 16,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        prefetch: int = 4,
        epochs: int | None = None,
        words: bool = False,
        embeddings: bool = False,
    ) -> None:
        where = dataset.layout.address
        if not len(dataset):
            raise QLIPError(f"{where}: no row to train on")
        if shuffle not in ("blocks", "full", "none") or window < 1 or (epochs is not None and epochs < 1):
            raise QLIPError(
                f"shuffle {shuffle!r}, window {window}, epochs {epochs}: need blocks, full or none, and at least 1 each"
            )
        check_layout(batch_size, 0, num_workers, rank, world)
        if words:
            dataset.words([])
        if embeddings:
            dataset.embeddings([])
        self.num_workers, self.prefetch, self.epochs = num_workers, prefetch, epochs
        self._position = 0
        self._reading = _Reading(dataset, shuffle, window, seed, batch_size, words, embeddings, rank=rank, world=world)

    @property
    def dataset(self) -> TokenDataset:
        """What it reads."""
        return self._reading.dataset

    @property
    def position(self) -> int:
        """Rows that all ranks together have had."""
        return self._position

    @property
    def epoch(self) -> int:
        """Full passes behind."""
        return self._position // len(self.dataset)

    def __iter__(self) -> Iterator[TokenBatch]:
        end = None if self.epochs is None else self.epochs * len(self.dataset)
        reading = replace(self._reading, start=self._position, end=end)
        row = in_turn(reading, self.num_workers, self.prefetch)
        try:
            while end is None or self._position < end:
                batch = next(row)
                self._position += reading.batch_size if end is None else min(reading.batch_size, end - self._position)
                yield batch
        finally:
            row.close()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: after the batch that was handed out last. Equal on all ranks."""
        reading = self._reading
        window = reading.window if reading.shuffle == "blocks" else None
        return {
            "position": self._position,
            "seed": reading.seed,
            "shuffle": reading.shuffle,
            "window": window,
            "dataset": digest(self.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a state, from the next loop on.

        Raises:
            QLIPError: it is of another dataset or of another order.
        """
        mine, where = self.state_dict(), self.dataset.layout.address
        if state.get("dataset") != mine["dataset"]:
            raise QLIPError(f"{where}: the saved state is of another dataset, or of one before parts were added")
        for name in ("seed", "shuffle", "window"):
            if state.get(name) != mine[name]:
                raise QLIPError(f"{where}: the saved state has {name} {state.get(name)!r}, this stream {mine[name]!r}")
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise QLIPError(f"{where}: the saved state has position {position!r}; need a count of rows")
        self._position = position


def digest(dataset: TokenDataset) -> str:
    """SHA-256 over what its parts hold, in order."""
    hashes: Sequence[str] = [entry.sha256 for entry in dataset.entries]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


class _AsItIs:
    """The order of the dataset itself."""

    def __call__(self, index: int) -> int:
        return index

    def many(self, indices: Numbers) -> Numbers:
        """The same for an array."""
        return indices
