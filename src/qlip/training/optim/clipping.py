"""Norms of whole tensors, plain or sharded over ranks, and gradient clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Layout = tuple[DeviceMesh, tuple[int, ...]] | None
"""A mesh and its dimensions over which a tensor is sharded; None for a tensor that is whole on this rank."""


def local(tensor: Tensor) -> Tensor:
    """Local part of a tensor: this rank's shard, or the whole plain tensor; in-place changes apply to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout(tensor: Tensor) -> Layout:
    """Layout of a tensor over ranks. Replicas (data parallel, HSDP) do not count as shards."""
    if not isinstance(tensor, DTensor):
        return None
    assert not any(placement.is_partial() for placement in tensor.placements)
    return tensor.device_mesh, tuple(i for i, placement in enumerate(tensor.placements) if isinstance(placement, Shard))


def whole_norms(shards: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Euclidean norms of whole tensors, of which this rank holds shards.

    Squares are summed locally, and all sums of one layout are reduced in one collective; so every rank of a mesh must
    call this with the same tensors in the same order.

    Args:
        shards: n plain tensors of any shape, at least one, on one device.
        like: n tensors with the layouts of the whole tensors.

    Returns:
        (n,) float32 (float64 for doubles), equal on all ranks of a mesh.
    """
    norms = _norms(shards)
    positions: dict[Layout, list[int]] = defaultdict(list)
    for number, tensor in enumerate(like):
        if (shared := layout(tensor)) is not None:
            positions[shared].append(number)
    for shared, numbers in positions.items():
        norms[numbers] = _sum_over(shared, norms[numbers].square()).sqrt()
    return norms


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``.

    A gradient that is not finite makes all of them so: check the returned norm before the optimizer step.

    Args:
        parameters: plain, sharded (DTensor), or both; a missing gradient counts as zero. All ranks must pass the same
            parameters; the gradients of plain ones must be equal on all ranks.
        max_norm: largest joint norm.

    Returns:
        Scalar float32 (float64 for doubles), the norm before clipping; a plain tensor, equal on all ranks.
    """
    groups: dict[Layout, list[Tensor]] = defaultdict(list)
    device = torch.device("cpu")
    for parameter in parameters:
        group = groups[layout(parameter)]  # also without a gradient: another rank may have one
        device = parameter.device
        if parameter.grad is not None:
            group.append(local(parameter.grad))
    squares = torch.zeros((), device=device)
    for shared, gradients in groups.items():
        square = torch.zeros((), device=device)
        if gradients:
            square = _norms(gradients).square().sum()
        squares = squares + _sum_over(shared, square)
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in groups.values():
        if gradients:
            torch._foreach_mul_(gradients, factor)
    return norm


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of plain tensors, (n,), in at least single precision."""
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64 if doubles else torch.float32))


def _sum_over(shared: Layout, values: Tensor) -> Tensor:
    """Sum values in place over the ranks that hold the other shards."""
    if shared is not None:
        mesh, dimensions = shared
        for dimension in dimensions:
            dist.all_reduce(values, group=mesh.get_group(dimension))
    return values
