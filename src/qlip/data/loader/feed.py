"""One interface to whatever a recipe reads: batches for a rank, each with the state from which all ranks can go on.

    feed = open_feed(config, seed, size, mean, std, tokenize, batch_size)
    for batch, state in feed.open(saved, rank=rank, world=world):
        ...                                       # a step; on saving: merge_states of all ranks' states

A state is JSON and belongs to no rank: it may be opened by another number of ranks, with another number of workers. Of
indexed sources alone it is the count of positions consumed; streamed sources add where their lanes stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlip.data.config import DataConfig, open_source, open_stream
from qlip.data.loader.batch import Batch, Tokenize, read_or_skip
from qlip.data.loader.mixed_stream import MixedShares, MixedStream, Moved, StreamedSource
from qlip.data.loader.stream import Source, TrainingStream, batches, check_layout, share_of
from qlip.data.loader.workers import in_turn
from qlip.data.shards.streaming import LaneState
from qlip.data.sources.base import RawSample
from qlip.errors import QLIPError

State = dict[str, Any]


class Feed(Protocol):
    """What a trainer reads."""

    @property
    def batch_size(self) -> int:
        """Positions a batch, of all ranks."""

    @property
    def sources(self) -> list[Source | StreamedSource]:
        """In the order of the recipe."""

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, State]]:
        """This rank's shares of the batches after a state, endless, each with its own state; ``close()`` ends workers.

        Args:
            state: merged of all ranks' (`merge_states`), however many there were; None begins.
            rank: of this process.
            world: processes that share each batch.

        Raises:
            QLIPError: fewer positions than ranks, a state of other data, or a store that failed for good.
        """


@dataclass(frozen=True)
class PositionFeed:
    """Indexed sources: a batch is a function of its position alone."""

    stream: TrainingStream
    batch_size: int
    num_workers: int = 0
    prefetch: int = 4

    @property
    def sources(self) -> list[Source | StreamedSource]:
        """The sources."""
        return list(self.stream.sources)

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, State]]:
        """See `Feed.open`."""
        position = _position(state)
        if state is not None and state.get("lanes"):
            raise QLIPError(f"data: the saved state reads {_listed(state)} from front to back, the recipe does not")
        row = batches(self.stream, self.batch_size, position, self.num_workers, self.prefetch, rank, world)
        for batch in row:
            position += self.batch_size
            yield batch, {"position": position}


@dataclass(frozen=True)
class MixedFeed:
    """Sources of which some are read from front to back."""

    stream: MixedStream
    num_workers: int = 0
    prefetch: int = 4

    @property
    def batch_size(self) -> int:
        """Positions a batch, of all ranks."""
        return self.stream.batch_size

    @property
    def sources(self) -> list[Source | StreamedSource]:
        """The sources."""
        return self.stream.sources

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, State]]:
        """See `Feed.open`."""
        position, lanes = _position(state), self._read(state)
        check_layout(self.batch_size, position, self.num_workers, rank, world)
        shares = MixedShares(self.stream, position, {n: dict(at) for n, at in lanes.items()}, rank, world)
        for batch, moved in in_turn(shares, self.num_workers, self.prefetch):
            position += self.batch_size
            for number, states in moved.items():
                lanes.setdefault(number, {}).update(states)
            yield batch, self._state(position, lanes)

    def _state(self, position: int, lanes: Moved) -> State:
        return {
            "position": position,
            "lanes": {
                source.name: {
                    "lanes": source.lanes,
                    "turns": source.turns,
                    "shards": source.digest,
                    "at": {str(lane): list(at) for lane, at in sorted(lanes.get(number, {}).items())},
                }
                for number, source in self.stream.streamed.items()
            },
        }

    def _read(self, state: State | None) -> Moved:
        """Lanes of a state, which must be of these sources."""
        found: Moved = {}
        if state is None:
            return found
        stated = dict(state.get("lanes", {}))
        for number, source in self.stream.streamed.items():
            one = stated.pop(source.name, None)
            if one is None:
                raise QLIPError(f"data: the saved state does not know {source.name!r}; go on with the sources it had")
            if one["shards"] != source.digest:
                raise QLIPError(f"{source.name}: other shards than when the state was saved; go on with those it had")
            if (one["lanes"], one["turns"]) != (source.lanes, source.turns):
                was = f"lanes: {one['lanes']}, turns: {one['turns']}"
                raise QLIPError(
                    f"{source.name}: lanes {source.lanes} and turns {source.turns}, but the state was saved with {was};"
                    " set these"
                )
            found[number] = {int(lane): LaneState(*at) for lane, at in one["at"].items()}
        if stated:
            raise QLIPError(f"data: the saved state reads {_listed(state)} from front to back, the recipe does not")
        return found


def open_feed(
    config: DataConfig,
    seed: int,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tokenize: Tokenize,
    batch_size: int,
) -> PositionFeed | MixedFeed:
    """The feed that a recipe describes.

    Args:
        config: its data part.
        seed: of order, augmentation and captions.
        size: (height, width) of the pixels.
        mean, std: normalisation, as the model's processor has it.
        tokenize: see `qlip.data.loader.batch.Tokenize`.
        batch_size: positions a batch, of all ranks together.

    Raises:
        QLIPError: a source that cannot be opened, or lanes that do not fit the batch or the shards.
    """
    if not any(source.streaming for source in config.sources):
        stream = open_stream(config, seed, size, mean, std, tokenize)
        return PositionFeed(stream, batch_size, config.num_workers, config.prefetch)
    sources = [open_source(config, one, seed, size, mean, std, batch_size) for one in config.sources]
    return MixedFeed(MixedStream(sources, seed, tokenize, batch_size), config.num_workers, config.prefetch)


def merge_states(states: Sequence[State]) -> State:
    """One state to save of the states of all ranks after the same batch.

    Raises:
        QLIPError: they are of different batches.
    """
    positions = sorted({state["position"] for state in states})
    if len(positions) != 1:
        raise QLIPError(f"data: states of different batches, at positions {', '.join(map(str, positions))}")
    merged: State = {"position": positions[0]}
    for state in states:
        for name, one in state.get("lanes", {}).items():
            known = merged.setdefault("lanes", {}).setdefault(name, one | {"at": {}})["at"]
            for lane, at in one["at"].items():  # who served a lane last knows best
                if lane not in known or LaneState(*known[lane]).samples < LaneState(*at).samples:
                    known[lane] = at
    return merged


def readable(source: Source | StreamedSource, limit: int) -> Iterator[RawSample]:
    """Samples that can be read among the first `limit` of a source, in its own order, for a look at them."""
    if isinstance(source, StreamedSource):
        yield from source.images.first(limit)
        return
    for index in range(min(limit, len(source.images))):
        raw = read_or_skip(source.images, index)
        if isinstance(raw, RawSample):
            yield raw


def captions_of(feed: Feed, limit: int) -> Iterator[str]:
    """Captions that training may draw, of up to `limit` samples a source: what a vocabulary is made of.

    A sample without captions but with a label gives it in one template.
    """
    for source in feed.sources:
        if not source.captions:
            continue
        for number, raw in enumerate(readable(source, limit)):
            if raw.captions:
                yield from raw.captions
            elif raw.label is not None and source.templates:
                yield source.templates[number % len(source.templates)].replace("{}", raw.label)


def describe(feed: Feed, world: int = 1) -> list[str]:
    """What a feed holds and what every rank would read of it, a line each."""
    scale = sum(source.weight for source in feed.sources)
    lines = []
    for source in feed.sources:
        share = f"{source.images.name}: {source.weight / scale:.1%} of the stream"
        if isinstance(source, StreamedSource):
            lanes = source.images
            lines.append(
                f"{share}, {len(lanes.shards):,} shards from front to back, {lanes.lanes} lanes x {lanes.turns} turns"
                + (", drawn with replacement" if lanes.replacement else "")
            )
        else:
            order = "in blocks" if source.blocks else "shuffled"
            lines.append(f"{share}, {len(source.images):,} samples {order}")
    for rank in range(world):
        low, high = share_of(feed.batch_size, rank, world)
        lines.append(f"rank {rank}: places {low} to {high - 1} of every batch of {feed.batch_size}")
    return lines


def _position(state: State | None) -> int:
    return 0 if state is None else int(state["position"])


def _listed(state: State) -> str:
    return ", ".join(map(repr, state["lanes"]))
