"""Cross entropy of a linear layer's outputs without the matrix of all logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_LOGITS = 1 << 22
"""Logits held at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of ``softmax(hidden @ weight.T)``, computed in float32 over blocks of rows.

    Equal to ``F.cross_entropy`` of the float32 logits, forward and backward; the logits exist only for a block of rows
    at a time, in the backward pass too, where they are computed again. Products have the dtype of ``hidden``, or
    autocast's.

    Args:
        hidden: (M, D) floating.
        weight: (V, D) floating.
        targets: (M,) int64 in [0, V).

    Returns:
        (M,) float32 nats.
    """
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    found: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with _without_autocast(hidden.device):
            cast = weight.to(hidden.dtype)
            nats = hidden.new_empty(len(hidden), dtype=torch.float32)
            norms = torch.empty_like(nats)
            for block in _blocks(hidden, weight):
                logits = (hidden[block] @ cast.T).float()  # (m, V)
                norms[block] = torch.logsumexp(logits, 1)
                nats[block] = norms[block] - logits.gather(1, targets[block, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, norms)
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients  # (M,)
        hidden, weight, targets, norms = ctx.saved_tensors
        with _without_autocast(hidden.device):
            cast = weight.to(hidden.dtype)
            to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for block in _blocks(hidden, weight):
                logits = (hidden[block] @ cast.T).float()  # (m, V)
                slope = (logits - norms[block, None]).exp_()
                slope.scatter_add_(1, targets[block, None], torch.full_like(norms[block, None], -1.0))
                slope = (slope * gradient[block, None]).to(hidden.dtype)
                if to_hidden is not None:
                    to_hidden[block] = slope @ cast
                if to_weight is not None:
                    to_weight += slope.T @ hidden[block]
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, MAX_LOGITS // len(weight))
    return [slice(begin, begin + rows) for begin in range(0, len(hidden), rows)]
