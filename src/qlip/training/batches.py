"""Protocols for batches and feeds that the trainer needs; image, token and packed batches implement them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch

State = dict[str, Any]
"""Position of a feed, for JSON; independent of rank and world size."""


class Skipped(Protocol):
    """A sample that could not be read, with a one-line reason."""

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
        """Reason why it could not be read."""
        ...


class Batch(Protocol):
    """This rank's samples of one step; :class:`qlip.data.loader.batch.SampleBatch` implements it for dataclasses."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Samples at the batch's positions that could not be read."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def split(self, number: int) -> list[Self]:
        """Split into ``number`` micro-batches; some are empty if there are fewer samples."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return a copy with all tensors on a device."""
        ...


B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Feed(Protocol[B_co]):
    """Source of batches for all ranks of a run; see :class:`qlip.data.loader.feed.Feed`."""

    @property
    def batch_size(self) -> int:
        """Samples per batch, over all ranks."""
        ...

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[B_co, State]]:
        """Iterate over (this rank's share of a batch, state after it), starting after ``state``."""
        ...

    def merge(self, states: Sequence[State]) -> State:
        """Merge the states of all ranks after the same batch into one state to save."""
        ...


def number_of_micro_batches(batch_size: int, world: int, micro_batch_size: int | None) -> int:
    """Number of micro-batches of each rank's share, which is at most ceil(batch_size / world).

    Args:
        batch_size: samples per step, over all ranks.
        world: number of ranks.
        micro_batch_size: maximum number of samples per forward pass of a rank; None for no limit.
    """
    share = -(-batch_size // world)
    return 1 if micro_batch_size is None else -(-share // micro_batch_size)
