"""Sigmoid alternative to L_align (SigLIP, arXiv 2303.15343): an independent loss per pair, without normalisation.

Ranks form a ring. Each rank keeps its images; texts and their partial gradients are sent around the ring until every
rank has processed all texts. A rank holds the texts of at most two ranks at a time. Each block of logits is computed
once, one chunk of rows at a time, and turned into gradients immediately.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlip.training.parallel.collectives import Shares, hand_on, ids_of, pack, shares_of, sum_over_ranks, unpack

TEXTS, GRADIENTS = 0, 1
"""Message tags of the ring exchange."""


def siglip(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    match_ids: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sigmoid loss of the B^2 pairs of all ranks, -1/B sum_ij log sigmoid(z_ij (s x_i . y_j + b)), in float32.

    z_ij is 1 if image i and text j match, else -1. A collective: all ranks call it, each with its own b pairs (b may
    differ, and may be 0); grad mode and the gradient of the result must be equal on all. After the data-parallel
    average over ranks, gradients are those of the global loss.

    Args:
        image_embeds: (b, E), unit length.
        text_embeds: (b, E), unit length; row i belongs to image i.
        logit_scale: scalar, log s (learned).
        bias: scalar, b (learned).
        match_ids: (b,) int64, equal for pairs with the same meaning, across ranks, which are positives of each other;
            None (on all ranks) treats all pairs as different.
        chunk_size: rows of logits, with the texts of one rank as columns, in memory at a time; None means all b rows.

    Returns:
        Scalar float32 (float64 from float64 embeddings), in nats per image, equal on all ranks; exactly zero, with a
        graph, if no rank has a pair. It can be differentiated once.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        loss: Tensor = _SigLIP.apply(  # type: ignore[no-untyped-call]
            image_embeds.to(dtype),
            text_embeds.to(dtype),
            logit_scale.to(dtype),
            bias.to(dtype),
            match_ids,
            chunk_size,
            torch.is_grad_enabled(),
        )
    return loss


class _Sums:
    """Sums over the texts that this rank has processed.

    Attributes:
        at_images: (b, E), the gradient of B times the loss at this rank's images.
        loss: B times the loss.
        at_bias: the gradient of B times the loss at the bias.
    """

    def __init__(self, images: Tensor, ids: Tensor, scale: Tensor, bias: Tensor, chunk_size: int) -> None:
        self.images, self.ids, self.scale, self.bias, self.chunk_size = images, ids, scale, bias, chunk_size
        self.at_images = torch.zeros_like(images)
        self.loss = images.new_zeros(())
        self.at_bias = torch.zeros_like(self.loss)

    def add(self, texts: Tensor, ids: Tensor, differentiated: bool) -> Tensor:
        """Add the texts (t, E) of a rank; return the gradient (t, E) at them of B times this rank's loss."""
        at_texts = torch.zeros_like(texts)
        for start in range(0, len(self.images), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            signs = 2.0 * (self.ids[rows, None] == ids) - 1
            logits = ((self.images[rows] * self.scale) @ texts.t() + self.bias).mul_(signs)
            self.loss += F.softplus(-logits).sum()
            if differentiated:
                errors = logits.neg_().sigmoid_().mul_(signs).neg_()
                self.at_bias += errors.sum()
                errors *= self.scale
                self.at_images[rows].addmm_(errors, texts)
                at_texts.addmm_(errors.t(), self.images[rows])
        return at_texts


class _SigLIP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        bias: Tensor,
        match_ids: Tensor | None,
        chunk_size: int | None,
        differentiated: bool,
    ) -> Tensor:
        shares = shares_of(len(images), images.device)
        ids = ids_of(match_ids, shares, images.device)
        sums = _Sums(images, ids, logit_scale.exp(), bias, chunk_size or max(len(images), 1))
        at_texts = _ring(sums, texts, shares, differentiated)
        at_scale = (sums.at_images * images).sum()  # d logit / d logit_scale is x_i . y_j s
        whole = sum_over_ranks(torch.stack((sums.loss, at_scale, sums.at_bias)))
        loss, at_scale, at_bias = (whole / max(shares.total, 1)).unbind()
        # undo the average over ranks for per-row gradients; the scalars' gradients are already global on every rank
        share = shares.world / max(shares.total, 1)
        ctx.save_for_backward(sums.at_images * share, at_texts * share, at_scale, at_bias)
        return loss.clone()  # a copy, not one of unbind's views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(upstream[0] * gradient for gradient in ctx.saved_tensors), None, None, None


def _ring(sums: _Sums, texts: Tensor, shares: Shares, differentiated: bool) -> Tensor:
    """Send all texts around the ring, adding to ``sums``; return the gradient (b, E) at this rank's texts.

    At hop k a rank holds the texts of the rank k places before it, and receives the next ones while it computes. The
    gradient follows its texts one hop later, and so needs one more hop to return to its rank.
    """
    like = (texts, sums.ids)
    visiting = pack(like)
    gradients = None
    for hop in range(shares.world):
        arriving = shares.counts[(shares.rank - hop - 1) % shares.world]
        following = hand_on(visiting, arriving, TEXTS) if hop + 1 < shares.world else None
        hop_texts, hop_ids = unpack(visiting, like)
        at_texts = sums.add(hop_texts, hop_ids, differentiated)
        if gradients is not None:
            at_texts += gradients()
        if differentiated and shares.world > 1:
            gradients = hand_on(at_texts, arriving, GRADIENTS)
        if following is not None:
            visiting = following()
    return at_texts if gradients is None else gradients()
