"""The sigmoid alternative to L_align (SigLIP, arXiv 2303.15343): every pair for itself, so nothing is normalised.

Ranks sit in a ring. Each keeps its images; the texts, with their gradient so far, are handed on from neighbour to
neighbour until every rank has met all of them. A rank never holds more than two ranks' texts, and a block of logits is
made once, a chunk of rows at a time, and turned into gradients at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlip.training.parallel.collectives import Shares, hand_on, ids_of, pack, shares_of, sum_over_ranks, unpack

TEXTS, GRADIENTS = 0, 1
"""Tags of what goes round."""


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

    z_ij is 1 where image i and text j belong together, else -1. All ranks call it, each with its own b pairs (b may
    differ, and may be 0), with grad mode and the gradient of the result the same on all. Gradients are those of the
    global loss after the data-parallel average over ranks.

    Args:
        image_embeds: (b, E), unit length.
        text_embeds: (b, E), unit length; row i belongs to image i.
        logit_scale: scalar, log s (learned).
        bias: scalar, b (learned).
        match_ids: (b,) int64, equal for pairs that mean the same, on whatever rank: all of these are positives; None
            (on all ranks) makes every pair its own.
        chunk_size: rows of logits, of one rank's texts as columns, that exist at a time; None makes all b at once.

    Returns:
        Scalar float32 (float64 from float64 embeddings), in nats an image, the same on all ranks; an exact zero, with
        a graph, where no rank has a pair. It can be differentiated once.
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
    """What a rank adds up over the texts it meets.

    Attributes:
        at_images: (b, E), the gradient of B times the loss.
        loss: B times the loss.
        at_bias: its gradient.
    """

    def __init__(self, images: Tensor, ids: Tensor, scale: Tensor, bias: Tensor, chunk_size: int) -> None:
        self.images, self.ids, self.scale, self.bias, self.chunk_size = images, ids, scale, bias, chunk_size
        self.at_images = torch.zeros_like(images)
        self.loss = images.new_zeros(())
        self.at_bias = torch.zeros_like(self.loss)

    def meet(self, texts: Tensor, ids: Tensor, differentiated: bool) -> Tensor:
        """Add a rank's texts (t, E); the gradient (t, E) of B times the loss at them, through this rank's images."""
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
        at_texts = _round(sums, texts, shares, differentiated)
        at_scale = (sums.at_images * images).sum()  # what it moves a logit by
        whole = sum_over_ranks(torch.stack((sums.loss, at_scale, sums.at_bias)))
        loss, at_scale, at_bias = (whole / max(shares.total, 1)).unbind()
        # the average over ranks divides what each has for its own rows; the scalars' gradients are whole on every rank
        share = shares.world / max(shares.total, 1)
        ctx.save_for_backward(sums.at_images * share, at_texts * share, at_scale, at_bias)
        return loss.clone()  # no view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(upstream[0] * gradient for gradient in ctx.saved_tensors), None, None, None


def _round(sums: _Sums, texts: Tensor, shares: Shares, differentiated: bool) -> Tensor:
    """Let every rank's texts meet every rank's images; the gradient (b, E) that this rank's texts come home with.

    At hop k a rank holds the texts of the rank k places back. The next ones arrive while these are computed with; a
    gradient is sent after the texts that it belongs to, one hop late, and so needs one hop more to come home.
    """
    like = (texts, sums.ids)
    visiting = pack(like)
    gradients = None
    for hop in range(shares.world):
        arriving = shares.counts[(shares.rank - hop - 1) % shares.world]
        following = hand_on(visiting, arriving, TEXTS) if hop + 1 < shares.world else None
        met_texts, met_ids = unpack(visiting, like)
        at_texts = sums.meet(met_texts, met_ids, differentiated)
        if gradients is not None:
            at_texts += gradients()
        if differentiated and shares.world > 1:
            gradients = hand_on(at_texts, arriving, GRADIENTS)
        if following is not None:
            visiting = following()
    return at_texts if gradients is None else gradients()
