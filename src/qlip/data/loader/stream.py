"""The training stream: position n is one augmented sample, a pure function of (seed, n).

Nothing here has a state, so a run that stopped after n samples goes on at n, with any number of ranks and workers, and
sees the very bytes it would have seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from qlip.data.loader.batch import Batch, RawBatch, Sample, SkippedSample, Tokenize
from qlip.data.loader.sampler import Numbers
from qlip.data.loader.stream_base import Blocks, Mixing, Source
from qlip.data.loader.workers import in_turn, loader
from qlip.data.storage.retry import RETRIES
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

__all__ = [
    "Batch",
    "Blocks",
    "SkippedSample",
    "RawBatch",
    "Sample",
    "Source",
    "Tokenize",
    "TrainingStream",
    "batches",
    "loader",
    "raw_batches",
    "share_of",
]

Made = TypeVar("Made")


class TrainingStream(Mixing[Source], Dataset[Sample | SkippedSample]):
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

    def __getitem__(self, position: int) -> Sample | SkippedSample:
        place = self.mixture[position]
        source = self.sources[place.source]
        name, index = source.images.name, place.index
        raw = self.read(place.source, index)
        if isinstance(raw, SkippedSample):
            return raw
        rng = self._generator(name, place.epoch, index)
        try:
            pixels = source.transform(load_image(raw.image), rng)
        except QLIPError as error:
            return SkippedSample(raw.key, name, str(error))
        caption, match = source.treatment.words(raw, rng)
        return Sample(pixels, caption, match, f"{name}/{raw.key}")

    def collate(self, items: Sequence[Sample | SkippedSample]) -> Batch:
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
            skipped=[item for item in items if isinstance(item, SkippedSample)],
        )

    def batch(self, positions: Numbers) -> Batch:
        """The batch of many positions: what `collate` makes of their samples, without their detours."""
        builder = self.builder(len(positions))
        for number, epoch, index in zip(*(array.tolist() for array in self.mixture.places(positions)), strict=True):
            self.add(builder, number, self.read(number, index), epoch, index)
        return builder.finish()

    def raw(self, positions: Numbers) -> RawBatch:
        """What lies at many positions, read and not decoded."""
        batch = RawBatch([], [])
        sources, _, indices = self.mixture.places(positions)
        for number, index in zip(sources.tolist(), indices.tolist(), strict=True):
            raw = self.read(number, index)
            if isinstance(raw, SkippedSample):
                batch.skipped.append(raw)
            else:
                batch.samples.append(raw)
                batch.names.append(self.sources[number].images.name)
        batch.retries = RETRIES.take()
        return batch


@dataclass(frozen=True)
class _Shares(Generic[Made]):
    """A rank's shares of the batches from position `start` on, read by workers in turn."""

    stream: TrainingStream
    make: Callable[[TrainingStream, Numbers], Made]
    batch_size: int
    start: int
    rank: int
    world: int

    def items(self, worker: int, workers: int) -> Iterator[Made]:
        """The batches of one worker."""
        share, stride = np.arange(*share_of(self.batch_size, self.rank, self.world)), workers * self.batch_size
        try:
            for first in itertools.count(self.start + worker * self.batch_size, stride):
                self.stream.prepare(first + share)
                self.stream.prepare(first + stride + share)
                yield self.make(self.stream, first + share)
        finally:
            self.stream.close()


def batches(
    stream: TrainingStream,
    batch_size: int,
    start: int = 0,
    num_workers: int = 0,
    prefetch: int = 4,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """This rank's shares of the batches from position `start` on, endless; batch i holds start + i * batch_size and on.

    `batch_size` is that of all ranks together, each of which takes its contiguous share of every batch, as equal as it
    goes: all shares, in the order of ranks, are the batch that one process alone would read. A batch may cross the
    border of an epoch. What to save is the count of positions consumed: start plus batch_size a batch, broken samples
    included. The bytes depend neither on `num_workers` nor on `world`. Workers end with the iterator, which ``close()``
    ends.

    Args:
        stream: the samples.
        batch_size: positions a batch, of all ranks.
        start: the first position.
        num_workers: decoding processes; 0 decodes here.
        prefetch: batches that a worker keeps ready.
        rank: of this process.
        world: processes that share each batch.

    Raises:
        QLIPError: fewer positions than ranks, or, when its turn comes, a store that failed for good.
    """
    check_layout(batch_size, start, num_workers, rank, world)
    shares = _Shares(stream, TrainingStream.batch, batch_size, start, rank, world)
    yield from in_turn(shares, num_workers, prefetch)


def raw_batches(
    stream: TrainingStream, batch_size: int, start: int = 0, num_workers: int = 0, prefetch: int = 4
) -> Iterator[RawBatch]:
    """As `batches`, neither decoded nor augmented: for whoever decodes elsewhere."""
    check_layout(batch_size, start, num_workers)
    yield from in_turn(_Shares(stream, TrainingStream.raw, batch_size, start, 0, 1), num_workers, prefetch)


def share_of(batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """First place and end of a rank's share of a batch; shares differ by one at most."""
    return rank * batch_size // world, (rank + 1) * batch_size // world


def check_layout(batch_size: int, start: int, num_workers: int, rank: int = 0, world: int = 1) -> None:
    """Raises QLIPError for numbers that make no sense."""
    if batch_size < 1 or start < 0 or num_workers < 0:
        raise QLIPError(f"batch_size {batch_size}, start {start}, num_workers {num_workers}: need at least 1, 0 and 0")
    if not 0 <= rank < world:
        raise QLIPError(f"rank {rank} of {world}: ranks count from 0 to {world - 1}")
    if batch_size < world:
        raise QLIPError(
            f"batch_size {batch_size} for {world} ranks: a rank would get nothing; it is of all ranks together"
        )
