"""Batches of a mixture in which some sources are indexed and some are read from front to back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlip.data.batch import Batch, BatchBuilder, BrokenSample, Tokenize, Treatment, read_or_break
from qlip.data.lanes import START, Lane, LaneState, TarLanes
from qlip.data.order import Mixture, generator
from qlip.data.stream import Source, check_sources, share_of
from qlip.data.transforms import TrainTransform

Moved = dict[int, dict[int, LaneState]]
"""By source and lane, where lanes stand."""


@dataclass(frozen=True)
class StreamedSource:
    """Shards that are read from front to back, and how the stream treats their samples."""

    images: TarLanes
    transform: TrainTransform
    weight: float = 1.0
    templates: tuple[str, ...] = ()
    captions: bool = True

    @property
    def treatment(self) -> Treatment:
        """What is made of its samples."""
        return Treatment(self.transform, self.templates, self.captions)


class MixedStream:
    """Sources of both kinds in their shares of every block of positions, as `Mixture` has it.

    A position of an indexed source is what it is in a `TrainingStream`; one of a streamed source takes the next sample
    of the lane that its place in the batch belongs to. So a batch depends on the seed, its number and the states of the
    lanes alone, and not on who reads it.

    Args:
        sources: at least one, of different names.
        seed: of order, augmentation and captions.
        tokenize: see `Tokenize`.
        batch_size: positions a batch, of all ranks.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """

    def __init__(
        self, sources: Sequence[Source | StreamedSource], seed: int, tokenize: Tokenize, batch_size: int
    ) -> None:
        check_sources([source.images.name for source in sources], [source.transform for source in sources])
        self.sources, self.seed, self.tokenize, self.batch_size = list(sources), seed, tokenize, batch_size
        self.streamed = {n: s.images for n, s in enumerate(self.sources) if isinstance(s, StreamedSource)}
        self.mixture = self._mixture()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "mixture"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.mixture = self._mixture()

    def _mixture(self) -> Mixture:
        names, weights = [s.images.name for s in self.sources], [s.weight for s in self.sources]
        sizes = [len(s.images) if isinstance(s, Source) else None for s in self.sources]
        orders = [s.open_order(self.seed) if isinstance(s, Source) else None for s in self.sources]
        return Mixture(names, sizes, weights, self.seed, orders)


@dataclass(frozen=True)
class MixedShares:
    """A rank's shares of the batches of a mixed stream, read by workers in turn.

    Each item is a batch and where the lanes stand after it, those that had a part in it. What a worker's lanes give to
    batches of other workers or ranks, it skips; with numbers that divide each other nothing is left to skip.

    Attributes:
        stream: read.
        start: the first position.
        states: where the lanes stand there; those not in it at their start.
        rank, world: as `qlip.data.stream.batches` has them.
    """

    stream: MixedStream
    start: int
    states: Mapping[int, Mapping[int, LaneState]]
    rank: int
    world: int

    def items(self, worker: int, workers: int) -> Iterator[tuple[Batch, Moved]]:
        """The batches of one worker."""
        hands = _Hands(self.stream, self.states, share_of(self.stream.batch_size, self.rank, self.world))
        size = self.stream.batch_size
        try:
            for number in itertools.count():
                first = self.start + number * size
                if number % workers == worker:
                    hands.prepare(first)
                    hands.prepare(first + workers * size)
                    yield hands.take(first)
                else:
                    hands.leave(first, number - worker, workers)
        finally:
            hands.close()


class _Hands:
    """What one worker holds: the lanes that its rank's share of a batch may touch."""

    def __init__(
        self, stream: MixedStream, states: Mapping[int, Mapping[int, LaneState]], share: tuple[int, int]
    ) -> None:
        self.stream, self.states = stream, states
        self.low, self.high = share
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._how = [source.treatment for source in stream.sources]
        self._spans = {number: self._span(lanes) for number, lanes in stream.streamed.items()}

    def take(self, first: int) -> tuple[Batch, Moved]:
        """This rank's share of the batch that begins at a position."""
        stream, size = self.stream, self.stream.batch_size
        low = min([self.low, *(span[0] for span in self._spans.values())])
        high = max([self.high, *(span[1] for span in self._spans.values())])
        sources, epochs, indices = (array.tolist() for array in stream.mixture.places(first + np.arange(low, high)))
        builder = BatchBuilder(self.high - self.low, stream.sources[0].transform.size, stream.tokenize)
        moved: Moved = {}
        for place, number, epoch, index in zip(range(low, high), sources, epochs, indices, strict=True):
            mine = self.low <= place < self.high
            if number in self._spans:
                begin, end = self._spans[number]
                if begin <= place < end:
                    lane = self._lane(number, stream.streamed[number].lane_at(first // size, place, size))
                    if mine:
                        self._add_drawn(builder, number, lane)
                    else:
                        lane.skip(1)
                    moved.setdefault(number, {})[lane.number] = lane.state
            elif mine:
                self._add_indexed(builder, number, epoch, index)
        return builder.finish(), moved

    def leave(self, first: int, distance: int, workers: int) -> None:
        """Skip what a batch of another worker takes from lanes that are read here too."""
        size, batch = self.stream.batch_size, first // self.stream.batch_size
        for number, lanes in self.stream.streamed.items():
            if distance % math.gcd(workers, lanes.turns):
                continue  # its lanes are none of ours
            begin, end = self._spans[number]
            sources = self.stream.mixture.sources_at(first + np.arange(begin, end))
            part = size // lanes.lanes
            for place in range(begin, end, part):
                count = int((sources[place - begin : place - begin + part] == number).sum())
                self._lane(number, lanes.lane_at(batch, place, size)).skip(count)

    def prepare(self, first: int) -> None:
        """Indexed sources that are far away begin to fetch their part of the share."""
        far = [n for n, s in enumerate(self.stream.sources) if isinstance(s, Source) and s.images.far]
        if far:
            places = self.stream.mixture.places(first + np.arange(self.low, self.high))
            for number in far:
                images = self.stream.sources[number].images
                assert not isinstance(images, TarLanes)
                images.prepare(places.indices[places.sources == number].tolist())

    def close(self) -> None:
        """Nothing more will be read."""
        for lane in self._lanes.values():
            lane.close()
        for source in self.stream.sources:
            if isinstance(source, Source):
                source.images.close()

    def _span(self, lanes: TarLanes) -> tuple[int, int]:
        """The places of a batch that belong to lanes which this share touches: whole parts of it."""
        part = self.stream.batch_size // lanes.lanes
        return self.low // part * part, -(-self.high // part) * part

    def _lane(self, source: int, number: int) -> Lane:
        key = source, number
        if key not in self._lanes:
            state = self.states.get(source, {}).get(number, START)
            self._lanes[key] = Lane(self.stream.streamed[source], number, state)
        return self._lanes[key]

    def _add_drawn(self, builder: BatchBuilder, number: int, lane: Lane) -> None:
        raw, identity = lane.next()
        name = self.stream.sources[number].images.name
        if isinstance(raw, BrokenSample):
            builder.drop(raw)
        else:
            builder.add(raw, name, self._how[number], generator(self.stream.seed, "sample", name, *identity))

    def _add_indexed(self, builder: BatchBuilder, number: int, epoch: int, index: int) -> None:
        images = self.stream.sources[number].images
        assert not isinstance(images, TarLanes)
        raw = read_or_break(images, index)
        if isinstance(raw, BrokenSample):
            builder.drop(raw)
        else:
            rng = generator(self.stream.seed, "sample", images.name, epoch, index)
            builder.add(raw, images.name, self._how[number], rng)
