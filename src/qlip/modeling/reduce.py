"""Sums over the global batch, differentiable, and counts to divide them by.

The backward pass sums gradients over ranks. After the data-parallel average of parameter gradients, the result is the
gradient of the global loss, equal to that of a single process with the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, with the gradient summed over ranks too; returns the tensor itself in a single process."""
    if not is_distributed():
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor)  # type: ignore[no-untyped-call]
    return result


def is_distributed() -> bool:
    """True if more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_count(count: int, device: torch.device) -> Tensor:
    """Sum of a number over ranks, scalar float32 (exact up to 2^24, rounded once beyond)."""
    counts = torch.tensor(float(count), dtype=torch.float64, device=device)
    if is_distributed():
        dist.all_reduce(counts)
    return counts.float()
