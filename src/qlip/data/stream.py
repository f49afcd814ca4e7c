"""The training stream: position n is one augmented sample, a pure function of (seed, n).

Nothing here has a state, so a run that stopped after n samples goes on at n, with any number of workers, and
sees the very bytes it would have seen.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qlip.data.captions import draw_caption, match_id
from qlip.data.order import Mixture, generator
from qlip.data.sources import CaptionedImages
from qlip.data.transforms import TrainTransform
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

Collated = TypeVar("Collated")
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), int64 (B, T), T the same always; it pickles, to run in workers."""


@dataclass(frozen=True)
class Source:
    """A set of captioned images and how the stream treats it."""

    images: CaptionedImages
    transform: TrainTransform
    weight: float = 1.0
    templates: tuple[str, ...] = ()
    captions: bool = True  # False: its words are ignored, its pictures train reconstruction alone


@dataclass(frozen=True)
class BrokenSample:
    """A sample that could not be read or decoded, and why, in one line."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One augmented picture, float32 (3, H, W), and the caption drawn for it."""

    pixels: Tensor
    caption: str | None
    match_id: int
    key: str


@dataclass
class Batch:
    """B samples that could be read, of the batch's positions; `broken` has the others.

    Attributes:
        pixel_values: float32 (B, 3, H, W), normalised.
        input_ids: int64 (B, T); the tokens of "" where there is no caption.
        has_caption: bool (B,).
        match_ids: int64 (B,): equal where two captioned pictures mean the same, 0 without caption.
        keys: "source/key" of each sample.
        captions: the text that `input_ids` encode, or None.
        broken: samples left out.
    """

    pixel_values: Tensor
    input_ids: Tensor
    has_caption: Tensor
    match_ids: Tensor
    keys: list[str]
    captions: list[str | None]
    broken: list[BrokenSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


class TrainingStream(Dataset[Sample | BrokenSample]):
    """The endless stream of samples as a map from positions 0, 1, 2, ...

    Augmentation and the choice of caption draw from a generator of (seed, source name, epoch, sample's
    number) alone: moving a weight changes which samples come, never what is made of one.

    Args:
        sources: at least one, of different names.
        seed: of order, augmentation and captions.
        tokenize: see `Tokenize`.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """

    def __init__(self, sources: Sequence[Source], seed: int, tokenize: Tokenize) -> None:
        names = [source.images.name for source in sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not sources:
            raise QLIPError("data: no source; name at least one")
        if twice is not None:
            raise QLIPError(f"data: two sources are called {twice!r}; name each once, or give one a name of its own")
        if len({source.transform.size for source in sources}) > 1:
            raise QLIPError("data: the sources' transforms differ in size; a batch needs one")
        self.sources, self.seed, self.tokenize = list(sources), seed, tokenize
        self.mixture = Mixture(names, [len(s.images) for s in sources], [s.weight for s in sources], seed)

    def __getitem__(self, position: int) -> Sample | BrokenSample:
        place = self.mixture[position]
        source = self.sources[place.source]
        name, key = source.images.name, source.images.key(place.index)
        rng = generator(self.seed, "sample", name, place.epoch, place.index)
        try:
            raw = source.images.read(place.index)
            pixels = source.transform(load_image(raw.image), rng)
        except QLIPError as error:
            return BrokenSample(key, name, str(error))
        caption = draw_caption(raw, source.templates, rng) if source.captions else None
        return Sample(pixels, caption, match_id(raw.label, caption), f"{name}/{key}")

    def collate(self, items: Sequence[Sample | BrokenSample]) -> Batch:
        """A batch of the samples, in their order, without the broken ones; B may be 0."""
        samples = [item for item in items if isinstance(item, Sample)]
        captions = [sample.caption for sample in samples]
        input_ids, _ = self.tokenize([caption or "" for caption in captions] or [""])
        height, width = self.sources[0].transform.size
        return Batch(
            pixel_values=torch.stack([s.pixels for s in samples]) if samples else torch.empty(0, 3, height, width),
            input_ids=input_ids[: len(samples)],
            has_caption=torch.tensor([caption is not None for caption in captions], dtype=torch.bool),
            match_ids=torch.tensor([sample.match_id for sample in samples], dtype=torch.int64),
            keys=[sample.key for sample in samples],
            captions=captions,
            broken=[item for item in items if isinstance(item, BrokenSample)],
        )


class _Positions:
    """Batches of positions from `start` on, without end."""

    def __init__(self, batch_size: int, start: int) -> None:
        self.batch_size, self.start = batch_size, start

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(self.start, self.batch_size):
            yield list(range(first, first + self.batch_size))


def batches(
    stream: TrainingStream, batch_size: int, start: int = 0, num_workers: int = 0, prefetch: int = 4
) -> Iterator[Batch]:
    """Batches of the stream from position `start` on, endless; batch i holds start + i * batch_size and on.

    What to save is the count of positions consumed: start plus batch_size a batch, broken samples included.
    The bytes do not depend on `num_workers`. Workers end with the iterator, which ``close()`` ends.

    Args:
        stream: the samples.
        batch_size: positions a batch.
        start: the first position.
        num_workers: decoding processes; 0 decodes here.
        prefetch: batches that a worker keeps ready.
    """
    if batch_size < 1 or start < 0 or num_workers < 0:
        raise QLIPError(f"batch_size {batch_size}, start {start}, num_workers {num_workers}: need at least 1, 0 and 0")
    yield from loader(stream, _Positions(batch_size, start), stream.collate, num_workers, prefetch)


def loader(
    dataset: Dataset[Any],
    positions: Iterable[list[int]],
    collate: Callable[[Sequence[Any]], Collated],
    num_workers: int,
    prefetch: int,
) -> Iterable[Collated]:
    """A DataLoader as this room uses it, for training and evaluation alike.

    Workers come from a fork server: forking a process whose torch, progress bar and log threads hold locks
    can hang. The generator is its own: loading never moves the global one, which a resumed run restores.
    """
    context = None
    if num_workers > 0:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once there, then each worker is a cheap fork
    return DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),
        multiprocessing_context=context,
        prefetch_factor=prefetch if num_workers > 0 else None,
        worker_init_fn=prepare_worker if num_workers > 0 else None,
    )


def prepare_worker(worker: int) -> None:
    """A worker computes with one thread, leaves Ctrl-C to its parent, which saves first, and ends when that ends."""
    del worker
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """torch watches the process that forked a worker: the fork server, which in turn lives as long as its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
