"""Norms of whole tensors, however ranks share them, and the clipping of gradients by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Layout = tuple[DeviceMesh, tuple[int, ...]] | None
"""A mesh and its dimensions over which a tensor is cut; None for a tensor that this rank holds whole."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its own shard, or all of it; changes in place reach the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout(tensor: Tensor) -> Layout:
    """How ranks share a tensor. A copy on several ranks (data parallel, HSDP) is not a cut."""
    if not isinstance(tensor, DTensor):
        return None
    assert not any(placement.is_partial() for placement in tensor.placements)
    return tensor.device_mesh, tuple(i for i, placement in enumerate(tensor.placements) if isinstance(placement, Shard))


def whole_norms(shards: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Euclidean norms of whole tensors, of which this rank holds shards.

    Shards are squared and summed where they lie, and all sums of one layout travel in one reduction; so every rank of a
    mesh must call this with the same tensors in the same order.

    Args:
        shards: n plain tensors of any shape, at least one, of one device.
        like: n tensors that are cut as the whole of each shard is.

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
    """Scale gradients in place so that the norm of all together is at most ``max_norm``.

    One that is not finite spoils them all: whoever steps looks at the returned norm first.

    Args:
        parameters: plain, sharded (DTensor), or both; one without a gradient counts as zero. All ranks must give the
            same ones; a plain one's gradient must be equal on all ranks.
        max_norm: the bound.

    Returns:
        Scalar float32 (float64 for doubles), the norm before clipping: a plain tensor, equal on all ranks.
    """
    groups: dict[Layout, list[Tensor]] = defaultdict(list)
    device = torch.device("cpu")
    for parameter in parameters:
        group = groups[layout(parameter)]  # made by a parameter without gradient too: another rank may have one
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
    """(n,) norms, in no less than single precision."""
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64 if doubles else torch.float32))


def _sum_over(shared: Layout, values: Tensor) -> Tensor:
    """Sum over the ranks that hold the other shards."""
    if shared is not None:
        mesh, dimensions = shared
        for dimension in dimensions:
            dist.all_reduce(values, group=mesh.get_group(dimension))
    return values
