"""Networks on many ranks: copies whose gradients are averaged (DDP), or shards of one (FSDP2, HSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from qlip.modeling.transformer import Block

VARIANTS = 64
"""Largest number of graphs compiled of one block."""


def compile_blocks(module: nn.Module) -> None:
    """torch.compile of each `Block`, in place: names stay, and the blocks of a tower share one graph.

    Three towers, with and without a graph, in batches of several sizes, go through one block's code: more variants than
    PyTorch would compile of it before it gives up and runs the rest uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for child in module.modules():
        if isinstance(child, Block):
            child.compile()


def replicate(module: nn.Module, ignored: Sequence[nn.Parameter], device: torch.device) -> nn.Module:
    """A copy on each rank, equal to the first rank's; gradients are averaged while the backward pass still runs.

    Every parameter that trains must take part in every step on every rank, be it with no rows.
    """
    left_alone = {id(parameter) for parameter in ignored}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in left_alone]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def shard(module: nn.Module, ignored: Sequence[nn.Parameter], mesh: DeviceMesh) -> nn.Module:
    """Shard parameters, gradients and with them optimizer states, block by block (FSDP2; a 2-D mesh makes it HSDP).

    A module with ``forward_methods`` (ways into a model beside its forward) is a unit too; each of the methods gathers
    weights as the forward does.

    Weights are gathered in float32 and cast by autocast, as on a single rank and with DDP: one arithmetic for all
    layouts. Half the traffic could be saved by gathering in bfloat16, but then norms' gains lose their digits, and a
    step of a batch as large as QLIP's hides the traffic. The root's weights are given back after the forward pass like
    a layer's: kept, they would be stale after an optimizer step or a swap of averages without a backward pass.
    """
    left_alone = set(ignored)
    inner = [child for child in module.modules() if _is_unit(child) and child is not module]
    for child in reversed(inner):  # children before the modules that hold them
        _shard_one(child, left_alone, mesh)
    if _unsharded(module) - left_alone:
        _shard_one(module, left_alone, mesh)
    return module


def _shard_one(module: nn.Module, left_alone: set[nn.Parameter], mesh: DeviceMesh) -> None:
    if not _unsharded(module) - left_alone:
        return
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=left_alone)
    for name in getattr(module, "forward_methods", ()):
        register_fsdp_forward_method(module, name)


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, Block) or hasattr(type(module), "forward_methods")


def _unsharded(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that no sharded module inside holds."""
    held: set[nn.Parameter] = set()
    for child in module.modules():
        if isinstance(child, FSDPModule):
            held |= set(child.parameters())
    return set(module.parameters()) - held


def synchronised(modules: Sequence[nn.Module], last: bool) -> ExitStack:
    """A context for a forward and backward pass after which ranks exchange gradients only if it is the ``last``."""
    stack = ExitStack()
    for module in modules:
        if isinstance(module, DistributedDataParallel) and not last:
            stack.enter_context(module.no_sync())
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.set_requires_gradient_sync(last, recurse=False)
    return stack


def averaged(gradients: Sequence[Tensor], world: int) -> None:
    """Average plain tensors over ranks, in place and in one message."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = (flat / world).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
