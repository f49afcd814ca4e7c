"""LossInputs that no loss uses: in a batch without words, embeddings lead nowhere.

DDP waits for a gradient of every parameter it wraps, so under it such inputs are pulled with nothing; the zeros that
arrive are then taken away, for a parameter without a gradient is one that its optimizer leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlip.training.task import LossInputs


def backward_through_unused(total: Tensor, inputs: LossInputs, modules: Sequence[nn.Module]) -> None:
    """The backward pass of a total that is made of inputs, through all of them.

    Args:
        total: scalar.
        inputs: with their graphs.
        modules: which made them, as wrapped for ranks.
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
    """The graph behind tensors, no further than ``until``."""
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
    return {node.variable for node in nodes if hasattr(node, "variable")}
