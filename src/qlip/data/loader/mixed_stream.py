"""Batches of a mixture in which some sources are indexed and some are read from front to back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlip.data.loader.batch import Batch, Tokenize
from qlip.data.loader.stream import share_of
from qlip.data.loader.stream_base import Mixing, Source, StreamedSource
from qlip.data.shards.streaming import START, Lane, LaneState, TarLanes

__all__ = ["MixedShares", "MixedStream", "Moved", "StreamedSource"]

Moved = dict[int, dict[int, LaneState]]
"""By source and lane, where lanes stand."""


class MixedStream(Mixing[Source | StreamedSource]):
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
        super().__init__(sources, seed, tokenize)
        self.batch_size = batch_size
        self.streamed = {n: s.images for n, s in enumerate(self.sources) if isinstance(s, StreamedSource)}


@dataclass(frozen=True)
class MixedShares:
    """A rank's shares of the batches of a mixed stream, read by workers in turn.

    Each item is a batch and where the lanes stand after it, those that had a part in it. What a worker's lanes give to
    batches of other workers or ranks, it skips; with numbers that divide each other nothing is left to skip.

    Attributes:
        stream: read.
        start: the first position.
        states: where the lanes stand there; those not in it at their start.
        rank, world: as `qlip.data.loader.stream.batches` has them.
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
        self._spans = {number: self._span(lanes) for number, lanes in stream.streamed.items()}

    def take(self, first: int) -> tuple[Batch, Moved]:
        """This rank's share of the batch that begins at a position."""
        stream, size = self.stream, self.stream.batch_size
        low = min([self.low, *(span[0] for span in self._spans.values())])
        high = max([self.high, *(span[1] for span in self._spans.values())])
        sources, epochs, indices = (array.tolist() for array in stream.mixture.places(first + np.arange(low, high)))
        builder = stream.builder(self.high - self.low)
        moved: Moved = {}
        for place, number, epoch, index in zip(range(low, high), sources, epochs, indices, strict=True):
            mine = self.low <= place < self.high
            if number in self._spans:
                begin, end = self._spans[number]
                if begin <= place < end:
                    lane = self._lane(number, stream.streamed[number].lane_at(first // size, place, size))
                    if mine:
                        raw, identity = lane.next()
                        stream.add(builder, number, raw, *identity)
                    else:
                        lane.skip(1)
                    moved.setdefault(number, {})[lane.number] = lane.state
            elif mine:
                stream.add(builder, number, stream.read(number, index), epoch, index)
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
        self.stream.prepare(first + np.arange(self.low, self.high))

    def close(self) -> None:
        """Nothing more will be read."""
        for lane in self._lanes.values():
            lane.close()
        self.stream.close()

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
