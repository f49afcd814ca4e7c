"""Means over the global batch, differentiable, weighted by each rank's count.

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


def global_mean(values: Tensor, columns: Tensor | None = None) -> Tensor:
    """Mean over the tokens of all ranks, each token with equal weight.

    Args:
        values: (T, ...) to average over the first axis; or, with ``columns``, (K, T, R).
        columns: (K, T, C): average the outer products of rows and columns, without making one for each token.

    Returns:
        ``values.shape[1:]``, or (K, R, C).
    """
    if columns is None:
        total, count = values.sum(0), values.shape[0]
    else:
        total, count = values.transpose(-2, -1) @ columns, values.shape[-2]
    if not is_distributed():
        return total / count
    counts = torch.tensor(float(count), dtype=torch.float64, device=values.device)
    dist.all_reduce(counts)
    return all_reduce_sum(total) / counts.to(total.dtype)
