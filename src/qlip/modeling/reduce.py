"""Sums over the global batch, differentiable, and counts to divide them by.

The backward pass sums gradients over ranks, so that after the data-parallel average of parameter gradients the result
is the gradient of the one global loss, as a single process with the whole batch would have it.
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
    """Sum over ranks, with the gradient summed over ranks too; the tensor itself in a single process."""
    if not is_distributed():
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor)  # type: ignore[no-untyped-call]
    return result


def is_distributed() -> bool:
    """Whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_count(count: int, device: torch.device) -> Tensor:
    """Sum over ranks of a number, scalar float32 (exact up to 2^24, rounded once beyond)."""
    counts = torch.tensor(float(count), dtype=torch.float64, device=device)
    if is_distributed():
        dist.all_reduce(counts)
    return counts.float()
