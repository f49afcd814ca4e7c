"""Feeds: batches for a rank, each with the state from which any number of ranks can continue.

    feed = PositionFeed(stream.batch, identity={}, batch_size=256, num_workers=4)
    for batch, state in feed.open(saved, rank=rank, world=world):
        ...                                       # a step; to save: feed.merge(the states of all ranks)

`Feed` is what a trainer reads. `PositionFeed` implements it for images and tokens alike: position n of an endless
stream is a pure function of n, so its state is the number of positions consumed and the `identity` of the stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from qlip.data.loader.sampler import Numbers
from qlip.data.loader.workers import round_robin_workers
from qlip.errors import QLIPError, check_integer

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)

State = dict[str, Any]
"""JSON values; a state belongs to no rank, and any number of ranks or workers can continue from it."""


class Feed(Protocol[B_co]):
    """Batches for the ranks of a training run."""

    @property
    def batch_size(self) -> int:
        """Samples per batch, of all ranks together."""

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[B_co, State]]:
        """Iterate over this rank's shares of the batches after a state, each with its own state.

        Args:
            state: merged of all ranks' states, however many there were; None starts at the beginning.
            rank: of this process.
            world: number of processes that share each batch.

        Raises:
            QLIPError: fewer samples per batch than ranks, a state of other data, or a storage that failed for good.
        """

    def merge(self, states: Sequence[State]) -> State:
        """Merge the states of all ranks after the same batch into one to save.

        Raises:
            QLIPError: they are of different batches.
        """


class PositionFeed(Generic[B]):
    """Batches that depend on their positions alone, made by worker processes.

    Batch i holds positions i * batch_size to (i + 1) * batch_size - 1; each rank makes its contiguous share of it. The
    batches depend neither on the number of workers nor on the number of ranks. Workers end with the iterator that
    `open` returns; its ``close()`` ends them.

    Args:
        make: maps positions, int64 (n,), to their batch. It runs in the workers, so it must pickle.
        identity: JSON values that determine the sample at each position, such as the seed. They are part of each state,
            and a state with other values is refused.
        batch_size: positions per batch, of all ranks together.
        num_workers: processes; 0 makes the batches in this one.
        prefetch: batches that each worker keeps ready.
        end: number of positions after which the feed ends, with a smaller last batch, maybe empty for a rank; None
            never ends.
        prepare: called in a worker with positions that `make` will soon be called with.
        close: called in each worker at the end.
        name: of the data, for error messages.
    """

    def __init__(
        self,
        make: Callable[[Numbers], B],
        identity: dict[str, Any],
        batch_size: int,
        num_workers: int = 0,
        prefetch: int = 4,
        *,
        end: int | None = None,
        prepare: Callable[[Numbers], None] | None = None,
        close: Callable[[], None] | None = None,
        name: str = "data",
    ) -> None:
        self.make, self.identity, self.batch_size = make, identity, batch_size
        self.num_workers, self.prefetch, self.end, self.name = num_workers, prefetch, end, name
        self._prepare, self._close = prepare, close

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Generator[tuple[B, State], None, None]:
        """See `Feed.open`."""
        position = self.position(state)
        check_layout(self.batch_size, position, self.num_workers, rank, world)
        shares = _RankShares(self.make, self.batch_size, position, self.end, rank, world, self._prepare, self._close)
        made = round_robin_workers(shares, self.num_workers, self.prefetch)
        try:
            while self.end is None or position < self.end:
                batch = next(made)
                position = shares.end_of_batch(position)
                yield batch, self.state(position)
        finally:
            made.close()

    def merge(self, states: Sequence[State]) -> State:
        """See `Feed.merge`."""
        return self.state(common_position([self.position(state) for state in states], self.name))

    def state(self, position: int) -> State:
        """State after a number of positions."""
        return {"position": position, **self.identity}

    def position(self, state: State | None) -> int:
        """Number of positions consumed in a state.

        Raises:
            QLIPError: it is the state of another feed.
        """
        if state is None:
            return 0
        for key in self.identity | state:
            if key != "position" and (key not in state or state[key] != self.identity.get(key, object())):
                saved, mine = state.get(key), self.identity.get(key)
                raise QLIPError(
                    f"{self.name}: the saved state has {key} {saved!r}, this feed {mine!r}; use the saved value"
                )
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise QLIPError(f"{self.name}: the saved state has position {position!r}; it must be a number of samples")
        return position


@dataclass(frozen=True)
class _RankShares(Generic[B]):
    """A rank's shares of the batches from position `start` on, for `round_robin_workers`."""

    make: Callable[[Numbers], B]
    batch_size: int
    start: int
    end: int | None
    rank: int
    world: int
    prepare: Callable[[Numbers], None] | None
    close: Callable[[], None] | None

    def items(self, worker: int, workers: int) -> Iterator[B]:
        """Iterate over the batches of one worker."""
        stride = workers * self.batch_size
        try:
            for first in itertools.count(self.start + worker * self.batch_size, stride):
                if self.end is not None and first >= self.end:
                    return
                if self.prepare is not None:
                    self.prepare(self.share(first))
                    self.prepare(self.share(first + stride))
                yield self.make(self.share(first))
        finally:
            if self.close is not None:
                self.close()

    def share(self, first: int) -> Numbers:
        """Return this rank's positions of the batch that begins at `first`."""
        low, high = share_of(max(0, self.end_of_batch(first) - first), self.rank, self.world)
        return np.arange(first + low, first + high)

    def end_of_batch(self, first: int) -> int:
        """Return the position after the batch that begins at `first`."""
        last = first + self.batch_size
        return last if self.end is None else min(last, self.end)


def common_position(positions: Sequence[int], name: str = "data") -> int:
    """Return the common position of all ranks' states.

    Raises:
        QLIPError: they are of different batches.
    """
    different = sorted(set(positions))
    if len(different) != 1:
        raise QLIPError(f"{name}: states of different batches, at positions {', '.join(map(str, different))}")
    return different[0]


def share_of(batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """Return the start and end of a rank's share of a batch; shares differ by at most one."""
    return rank * batch_size // world, (rank + 1) * batch_size // world


def check_layout(batch_size: int, start: int, num_workers: int, rank: int = 0, world: int = 1) -> None:
    """Check batch size, start, workers, rank and world size.

    Raises:
        QLIPError: a number is out of range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("num_workers", num_workers, 0)):
        check_integer(name, value, least)
    if not 0 <= rank < world:
        raise QLIPError(f"rank {rank} of {world}: ranks count from 0 to {world - 1}")
    if batch_size < world:
        raise QLIPError(
            f"batch_size {batch_size} for {world} ranks: a rank would get no sample; it counts the samples of all ranks"
        )
