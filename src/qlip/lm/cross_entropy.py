"""Cross entropy of a linear layer's outputs without the matrix of all logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_LOGITS = 1 << 22
"""Logits held at a time."""
MAX_PRODUCT = 1 << 13
"""Rows of a weight whose gradient is held at a time in another type than float32."""

Span = tuple[int, int]
"""First of neighbouring rows of a weight, and the one behind the last."""


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
    return linear_softmax(hidden, weight, targets)[0]


def linear_softmax(
    hidden: Tensor, weight: Tensor, targets: Tensor, spans: Sequence[Span] = (), span_of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy and normaliser of softmaxes, each over all rows of a weight or over a span of them.

    See :func:`linear_cross_entropy`; logits outside of a row's span are not computed.

    Args:
        hidden: (M, D) floating.
        weight: (V, D) floating.
        targets: (M,) int64, number of a row of `weight`, inside its span.
        spans: of the softmaxes; none is one softmax over all rows.
        span_of: (M,) int64, number of the span of each row of `hidden`; not given without spans.

    Returns:
        (M,) float32 nats, and (M,) float32 logarithms of the sums of exponentials, both differentiable.
    """
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    nats, norms = _LinearSoftmax.apply(hidden, weight, targets, tuple(spans), span_of)  # type: ignore[no-untyped-call]
    return nats, norms


class _LinearSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, spans: tuple[Span, ...], span_of: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with _without_autocast(hidden.device):
            cast = weight.to(hidden.dtype)
            nats = hidden.new_empty(len(hidden), dtype=torch.float32)
            norms = torch.empty_like(nats)
            for block, (begin, end) in _blocks(hidden, weight, spans, span_of):
                logits = (hidden[block] @ cast[begin:end].T).float()  # (m, rows of the span)
                norm = torch.logsumexp(logits, 1)
                nats[block] = norm - logits.gather(1, targets[block][:, None] - begin)[:, 0]
                norms[block] = norm
        ctx.spans = spans
        ctx.save_for_backward(hidden, weight, targets, norms, span_of)
        return nats, norms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        of_nats, of_norms = gradients  # (M,)
        hidden, weight, targets, norms, span_of = ctx.saved_tensors
        if of_nats is None:
            of_nats = torch.zeros_like(norms)
        with _without_autocast(hidden.device):
            cast = weight.to(hidden.dtype)
            to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for block, (begin, end) in _blocks(hidden, weight, ctx.spans, span_of):
                rows, part = hidden[block], cast[begin:end]
                slope = (rows @ part.T).float().sub_(norms[block][:, None]).exp_()  # (m, rows of the span)
                more = None if of_norms is None else slope * of_norms[block][:, None]
                slope.scatter_add_(1, targets[block][:, None] - begin, torch.full_like(norms[block][:, None], -1.0))
                slope = slope.mul_(of_nats[block][:, None])
                slope = (slope if more is None else slope.add_(more)).to(hidden.dtype)
                if to_hidden is not None:
                    to_hidden[block] = slope @ part
                if to_weight is not None:
                    _add_product(to_weight[begin:end], slope.T, rows)
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a float32 total (V, D), without a second matrix of its size."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
        return
    for some, of in zip(total.split(MAX_PRODUCT), left.split(MAX_PRODUCT), strict=True):
        some += of @ right


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _blocks(
    hidden: Tensor, weight: Tensor, spans: tuple[Span, ...], span_of: Tensor | None
) -> Iterator[tuple[slice | Tensor, Span]]:
    """Rows of `hidden` whose logits are held at a time, and their span."""
    if span_of is None:
        rows = max(1, MAX_LOGITS // len(weight))
        for begin in range(0, len(hidden), rows):
            yield slice(begin, begin + rows), (0, len(weight))
        return
    for number, span in enumerate(spans):
        places = (span_of == number).nonzero()[:, 0]
        for block in places.split(max(1, MAX_LOGITS // (span[1] - span[0]))):
            yield block, span
