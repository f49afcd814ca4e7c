"""Wrappers of networks for many ranks: replicas with averaged gradients (DDP), or shards (FSDP2, HSDP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qlip.modeling.transformer import Block

Placed = TypeVar("Placed", bound=nn.Module)
VARIANTS = 64
"""Maximum number of compiled graphs of one block."""


def placed(module: Placed, device: torch.device) -> Placed:
    """Move a module to a device; one that is there stays untouched, for modules without memory cannot move."""
    there = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if there else module.to(device)


def compile_blocks(module: nn.Module) -> None:
    """Compile each `Block` in place with torch.compile: names stay, and the blocks of a tower share one graph.

    All three towers use the block's code, with and without gradients, at several batch sizes. That is more variants
    than PyTorch's default limit, above which it falls back to eager mode.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for child in module.modules():
        if isinstance(child, Block):
            child.compile()


def checkpoint_blocks(module: nn.Module) -> None:
    """Make each `Block` store only its inputs in training, and recompute the rest in the backward pass."""
    for child in module.modules():
        if isinstance(child, Block):
            child.activation_checkpointing = True


def replicate(module: nn.Module, ignored: Sequence[nn.Parameter], device: torch.device) -> nn.Module:
    """Replicate a module from rank 0 to all ranks (DDP); gradients are averaged during the backward pass.

    Every trainable parameter must get a gradient at every step on every rank, even if its batch is empty.
    """
    skipped = {id(parameter) for parameter in ignored}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in skipped]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def shard(module: nn.Module, ignored: Sequence[nn.Parameter], mesh: DeviceMesh) -> nn.Module:
    """Shard parameters, gradients and with them optimizer states, block by block (FSDP2; a 2-D mesh makes it HSDP).

    A module with ``forward_methods`` (entry points besides its forward) is a unit too; each of the methods gathers
    weights as the forward does.

    Weights are gathered in float32 and cast by autocast, as on a single rank and with DDP, so that all layouts compute
    the same. Gathering in bfloat16 would halve the traffic, but lose precision in normalisation gains, and at QLIP's
    batch sizes computation hides the traffic. The root's weights are resharded after the forward pass like a layer's;
    otherwise they would be stale after an optimizer step or an EMA swap without a backward pass.
    """
    skipped = set(ignored)
    inner = [child for child in module.modules() if _is_unit(child) and child is not module]
    for child in reversed(inner):  # children before their parents
        _shard_one(child, skipped, mesh)
    if _unsharded(module) - skipped:
        _shard_one(module, skipped, mesh)
    return module


def _shard_one(module: nn.Module, skipped: set[nn.Parameter], mesh: DeviceMesh) -> None:
    """Shard one unit, unless all its parameters are ignored or sharded already."""
    if not _unsharded(module) - skipped:
        return
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=skipped)
    for name in getattr(module, "forward_methods", ()):
        register_fsdp_forward_method(module, name)


def _is_unit(module: nn.Module) -> bool:
    """True for a module that FSDP shards and gathers as one unit."""
    return isinstance(module, Block) or hasattr(type(module), "forward_methods")


def _unsharded(module: nn.Module) -> set[nn.Parameter]:
    """Parameters of a module that are not in a sharded module inside it."""
    held: set[nn.Parameter] = set()
    for child in module.modules():
        if isinstance(child, FSDPModule):
            held |= set(child.parameters())
    return set(module.parameters()) - held


def synchronised(modules: Sequence[nn.Module], last: bool) -> ExitStack:
    """Context for a forward and backward pass that synchronises gradients over ranks only if it is the ``last``."""
    stack = ExitStack()
    for module in modules:
        if isinstance(module, DistributedDataParallel) and not last:
            stack.enter_context(module.no_sync())
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.set_requires_gradient_sync(last, recurse=False)
    return stack


def whole_tensors(weights: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; all ranks call it, and only those that ``keep`` hold more than one at a time."""
    found = {}
    for name, weight in weights.items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if keep:
            found[name] = whole.detach().cpu()
    return found


def averaged(gradients: Sequence[Tensor], world: int) -> None:
    """Average plain tensors over ranks, in place and in one collective."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = (flat / world).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
