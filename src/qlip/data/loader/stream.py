"""Training streams of captioned images: position n is one augmented sample, a pure function of (seed, n).

`Source` is a set of images with its transform and weight. `SourceMixture` maps positions to sources and their samples,
and `TrainingStream` reads, decodes and augments them. A stream has no state: a run that stopped after n samples
continues at n, with any number of ranks and workers, and gets the same bytes. `batches` and `ImageFeed` read a stream
in worker processes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from qlip.data.loader.batch import (
    Batch,
    BatchBuilder,
    RawBatch,
    Sample,
    SampleTransform,
    SkippedSample,
    TextFaults,
    Tokenize,
    read_or_skip,
)
from qlip.data.loader.feed import PositionFeed, State, check_layout
from qlip.data.loader.sampler import BlockShuffle, Mixture, Numbers, OpenOrder
from qlip.data.loader.transforms import TrainTransform
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.data.storage.retry import RETRIES
from qlip.errors import QLIPError
from qlip.runtime.rng import generator

Made = TypeVar("Made")


@dataclass(frozen=True)
class Blocks:
    """Shuffle blocks instead of single samples; see `qlip.data.loader.sampler.BlockShuffle`.

    Attributes:
        size: samples per block; None: a block is what a source reads at once, one of its `CaptionedImages.chunk_sizes`.
        window: blocks mixed with each other.
    """

    size: int | None
    window: int


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """Name, unique among the sources of a stream."""


@dataclass(frozen=True)
class BaseSource:
    """Captioned images with their transform and weight; base of indexed and streamed sources."""

    images: Named
    transform: TrainTransform
    weight: float = 1.0
    templates: tuple[str, ...] = ()
    captions: bool = True  # False: text is ignored, images train reconstruction alone

    @property
    def sample_transform(self) -> SampleTransform:
        """Transform from the source's samples to training samples."""
        return SampleTransform(self.transform, self.templates, self.captions)


@dataclass(frozen=True)
class Source(BaseSource):
    """A set of captioned images, read in any order."""

    images: CaptionedImages
    blocks: Blocks | None = None

    def open_order(self, seed: int) -> OpenOrder | None:
        """Return the order of each epoch; None for a permutation of all samples."""
        if self.blocks is None:
            return None
        name, runs = self.images.name, self.images.chunk_sizes()
        size, window = self.blocks.size or max(runs), self.blocks.window
        return lambda epoch: BlockShuffle(runs, size, window, seed, "order", name, epoch)


AnySource = TypeVar("AnySource", bound=BaseSource)


class SourceMixture(Generic[AnySource]):
    """Several sources mixed by `Mixture`, and batches of their samples.

    Pickling leaves out the mixture, whose orders are functions; unpickling makes it again.

    Args:
        sources: at least one, of different names.
        seed: of order, augmentation and captions.
        tokenize: see `Tokenize`.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """

    def __init__(self, sources: Sequence[AnySource], seed: int, tokenize: Tokenize) -> None:
        _check(sources)
        self.sources, self.seed, self.tokenize = list(sources), seed, tokenize
        self.mixture = self._mixture()
        self._transforms = [source.sample_transform for source in sources]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "mixture"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.mixture = self._mixture()

    def builder(self, capacity: int) -> BatchBuilder:
        """Make a builder of a batch of at most `capacity` samples."""
        return BatchBuilder(capacity, self.sources[0].transform.size, self.tokenize)

    def read(self, number: int, index: int) -> RawSample | SkippedSample:
        """Read sample `index` of source `number`, which is indexed."""
        source = self.sources[number]
        assert isinstance(source, Source)
        return read_or_skip(source.images, index)

    def add(self, builder: BatchBuilder, number: int, raw: RawSample | SkippedSample, *identity: int) -> None:
        """Decode and augment a sample of source `number`; random draws depend on seed, source and identity alone."""
        if isinstance(raw, SkippedSample):
            builder.skip(raw)
            return
        name = self.sources[number].images.name
        builder.add(raw, name, self._transforms[number], self._generator(name, *identity))

    def prepare(self, positions: Numbers) -> None:
        """Prefetch samples of positions that are read soon, of indexed sources in remote storage."""
        remote = [(n, s.images) for n, s in enumerate(self.sources) if isinstance(s, Source) and s.images.remote]
        if remote:
            sources, _, indices = self.mixture.places(positions)
            for number, images in remote:
                images.prefetch(indices[sources == number].tolist())

    def close(self) -> None:
        """End prefetching."""
        for source in self.sources:
            if isinstance(source, Source):
                source.images.close()

    def _mixture(self) -> Mixture:
        names, weights = [s.images.name for s in self.sources], [s.weight for s in self.sources]
        sizes = [len(s.images) if isinstance(s, Source) else None for s in self.sources]
        orders = [s.open_order(self.seed) if isinstance(s, Source) else None for s in self.sources]
        return Mixture(names, sizes, weights, self.seed, orders)

    def _generator(self, name: str, *identity: int) -> np.random.Generator:
        return generator(self.seed, "sample", name, *identity)


class TrainingStream(SourceMixture[Source], Dataset[Sample | SkippedSample]):
    """Endless stream of samples as a map from positions 0, 1, 2, ...

    Augmentation and the choice of caption draw from a generator of (seed, source name, epoch, index of the sample)
    alone: other weights change the order of the samples, but not how each is augmented.

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
        pixels = torch.empty(3, *source.transform.size)
        try:
            caption, match = source.sample_transform.into(raw, rng, pixels.numpy())
        except QLIPError as error:
            return SkippedSample(raw.key, name, str(error))
        fault = raw.text_fault if source.captions else None
        return Sample(pixels, caption, match, f"{name}/{raw.key}", fault)

    def collate(self, items: Sequence[Sample | SkippedSample]) -> Batch:
        """Make a batch of samples, keeping their order; B may be 0."""
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
            text_faults=[sample.text_fault for sample in samples if sample.text_fault is not None],
        )

    def batch(self, positions: Numbers) -> Batch:
        """Make the batch of many positions, equal to `collate` of their samples, but faster."""
        builder = self.builder(len(positions))
        for number, epoch, index in zip(*(array.tolist() for array in self.mixture.places(positions)), strict=True):
            self.add(builder, number, self.read(number, index), epoch, index)
        return builder.finish()

    def raw(self, positions: Numbers) -> RawBatch:
        """Read the samples at many positions without decoding them."""
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


class ImageFeed(PositionFeed[Batch]):
    """Feed of a training stream."""

    def __init__(self, stream: TrainingStream, batch_size: int, num_workers: int = 0, prefetch: int = 4) -> None:
        super().__init__(
            stream.batch, {}, batch_size, num_workers, prefetch, prepare=stream.prepare, close=stream.close
        )
        self.stream = stream

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Generator[tuple[Batch, State], None, None]:
        """See `qlip.data.loader.feed.Feed.open`; warns of captions and labels that were left out or repaired."""
        faults = TextFaults()
        with closing(faults), closing(super().open(state, rank=rank, world=world)) as batches:
            for batch, after in batches:
                faults.add(batch.text_faults)
                yield batch, after

    @property
    def sources(self) -> list[Source]:
        """Sources in the order of the recipe."""
        return self.stream.sources

    def position(self, state: State | None) -> int:
        """See `PositionFeed.position`."""
        if state is not None and state.get("lanes"):
            names = ", ".join(map(repr, state["lanes"]))
            raise QLIPError(f"data: the saved state streams {names}, the recipe does not; set 'streaming: true' there")
        return super().position(state)


def batches(
    stream: TrainingStream,
    batch_size: int,
    start: int = 0,
    num_workers: int = 0,
    prefetch: int = 4,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Iterate over this rank's shares of the batches from position `start` on, without end.

    Batch i holds the positions from start + i * batch_size on; a batch may cross the border of an epoch. All shares, in
    the order of ranks, are the batch that one process alone would read. To save: the number of positions consumed,
    start plus batch_size per batch, skipped samples included.

    Args:
        stream: the samples.
        batch_size: positions per batch, of all ranks.
        start: the first position.
        num_workers: decoding processes; 0 decodes in this one.
        prefetch: batches that each worker keeps ready.
        rank: of this process.
        world: number of processes that share each batch.

    Raises:
        QLIPError: fewer positions than ranks, or, when its batch is due, a store that failed for good.
    """
    yield from _batches(ImageFeed(stream, batch_size, num_workers, prefetch), start, rank, world)


def raw_batches(
    stream: TrainingStream, batch_size: int, start: int = 0, num_workers: int = 0, prefetch: int = 4
) -> Iterator[RawBatch]:
    """Iterate over batches like `batches`, neither decoded nor augmented, for decoding elsewhere."""
    feed = PositionFeed(stream.raw, {}, batch_size, num_workers, prefetch, prepare=stream.prepare, close=stream.close)
    yield from _batches(feed, start)


def _batches(feed: PositionFeed[Made], start: int, rank: int = 0, world: int = 1) -> Iterator[Made]:
    """Iterate over a feed's batches from a position on, without the states."""
    check_layout(feed.batch_size, start, feed.num_workers, rank, world)
    with closing(feed.open({"position": start}, rank=rank, world=world)) as opened:
        for batch, _ in opened:
            yield batch


def _check(sources: Sequence[BaseSource]) -> None:
    """Check that sources can form one stream.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """
    names = [source.images.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names:
        raise QLIPError("data: no source; name at least one")
    if twice is not None:
        raise QLIPError(f"data: two sources are called {twice!r}; name each once, or give one a name of its own")
    if len({source.transform.size for source in sources}) > 1:
        raise QLIPError("data: the sources' transforms differ in size; a batch needs one")
