"""Backward pass with loss inputs that no loss uses, e.g. text embeddings in a batch without captions.

DDP waits for a gradient of every wrapped parameter. So under DDP unused inputs enter the total with weight 0, and the
resulting zero gradients are removed afterwards, so that the optimizer skips these parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlip.training.task import LossInputs


def backward_through_unused(total: Tensor, inputs: LossInputs, modules: Sequence[nn.Module]) -> None:
    """Run the backward pass of a total loss through all inputs, used or not.

    Args:
        total: total loss, scalar.
        inputs: loss inputs, with their graphs.
        modules: wrapped modules that computed the inputs.
    """
    if not any(isinstance(module, DistributedDataParallel) for module in modules):
        total.backward()
        return
    tensors = [
        one for kind in (inputs.embeddings, inputs.mean_stats, inputs.sums) for one in kind.values() if one.grad_fn
    ]
    used = _nodes([total], {one.grad_fn for one in tensors})
    idle = [one for one in tensors if one.grad_fn not in used]
    if not idle:
        total.backward()
        return
    by_losses = _parameters(_nodes([total]))
    fresh = [one for one in _parameters(_nodes(idle)) - by_losses if one.grad is None]
    (total + torch.stack([(one * 0).sum() for one in idle]).sum()).backward()
    for parameter in fresh:
        parameter.grad = None


def _nodes(tensors: Iterable[Tensor], until: set[Any] | None = None) -> set[Any]:
    """Autograd nodes behind tensors, not traversed beyond the nodes in ``until``."""
    waiting = [one.grad_fn for one in tensors if one.grad_fn is not None]
    found: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if until is None or node not in until:
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _parameters(nodes: set[Any]) -> set[Tensor]:
    """Parameters whose gradients the nodes accumulate."""
    return {node.variable for node in nodes if hasattr(node, "variable")}
