"""Batches and feeds as a trainer sees them: protocols that image batches, token batches and packed batches satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch

State = dict[str, Any]
"""Position of a feed, as JSON; it belongs to no rank."""


class Skipped(Protocol):
    """A sample that could not be read, with the reason in one line."""

    @property
    def key(self) -> str:
        """Name of the sample in its source."""
        ...

    @property
    def source(self) -> str:
        """Name of the source."""
        ...

    @property
    def reason(self) -> str:
        """Why it could not be read."""
        ...


class Batch(Protocol):
    """Samples of this rank; :class:`qlip.data.loader.batch.SampleBatch` implements it for dataclasses."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Samples of the batch's positions that could not be read."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def split(self, number: int) -> list[Self]:
        """Cut into micro-batches; with fewer samples than that, some are empty."""
        ...

    def to(self, device: torch.device) -> Self:
        """Copy with all tensors on a device."""
        ...


B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Feed(Protocol[B_co]):
    """Batches for the ranks of a training; see :class:`qlip.data.loader.feed.Feed`."""

    @property
    def batch_size(self) -> int:
        """Samples per batch, of all ranks together."""
        ...

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[B_co, State]]:
        """Iterate over this rank's shares of the batches after a state, each with its own state."""
        ...

    def merge(self, states: Sequence[State]) -> State:
        """Merge the states of all ranks after the same batch into one to save."""
        ...


def number_of_micro_batches(batch_size: int, world: int, micro_batch_size: int | None) -> int:
    """Number of micro-batches of each rank's share, which is at most ceil(batch_size / world).

    Args:
        batch_size: positions of the global batch.
        world: number of ranks.
        micro_batch_size: most samples that a rank holds at a time; None holds all.
    """
    share = -(-batch_size // world)
    return 1 if micro_batch_size is None else -(-share // micro_batch_size)
