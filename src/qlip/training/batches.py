"""Batches as a trainer sees them: dataclasses whose tensors and lists have a row a sample."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor


class Dataclass(Protocol):
    """Any of them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Rows = TypeVar("Rows", bound=Dataclass)


class Countable(Protocol):
    """A dataclass that knows how many samples it has, and which of its positions were broken."""

    broken: list[Any]

    def __len__(self) -> int: ...


def to_device(batch: Rows, device: torch.device) -> Rows:
    """The same with all tensors on a device; to a GPU they travel from pinned memory while the host goes on."""
    if device.type == "cpu":
        return batch
    moved = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            pinned = value if value.is_pinned() or device.type != "cuda" else value.pin_memory()
            moved[field.name] = pinned.to(device, non_blocking=True)
    return replace(batch, **moved)


def split(batch: Rows, number: int) -> list[Rows]:
    """Cut a batch into so many, whose sizes differ by one at most; where it has fewer samples some are empty."""
    if number == 1:
        return [batch]
    rows = len(batch)  # type: ignore[arg-type]
    bounds = [rows * part // number for part in range(number + 1)]
    return [_slice(batch, rows, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _slice(batch: Rows, rows: int, start: int, stop: int) -> Rows:
    cut = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor | list) and len(value) == rows:
            cut[field.name] = value[start:stop]
    return replace(batch, **cut)


def number_of_micro_batches(batch_size: int, world: int, micro_batch_size: int | None) -> int:
    """How many micro-batches every rank makes of its share; a rank's share is at most ceil(batch_size / world).

    Args:
        batch_size: positions of the global batch.
        world: ranks.
        micro_batch_size: most samples a rank holds at a time; None holds all.
    """
    share = -(-batch_size // world)
    return 1 if micro_batch_size is None else -(-share // micro_batch_size)
