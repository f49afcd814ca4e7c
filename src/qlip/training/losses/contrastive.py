"""L_align: symmetric InfoNCE (CLIP, arXiv 2103.00020) over the global batch, with shared targets among equals.

The table of logits, B images by B texts, never exists as a whole. A rank has its b images against the texts of all, a
chunk of rows at a time: a first walk over the chunks finds the normalisers of rows and columns (a column's is put
together from all chunks and ranks), a second one, where gradients are wanted, makes each chunk again and turns it into
gradients at once. So nothing but gradients of the embeddings waits for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from qlip.modeling.reduce import is_distributed
from qlip.training.parallel.collectives import gather_rows, ids_of, scatter_sum, shares_of, sum_over_ranks

Chunk = tuple[slice, Tensor]


def info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    match_ids: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Contrastive loss of the B matched pairs of all ranks, in float32 whatever autocast says.

    Where several pairs mean the same (equal captions, or one class), all of them are positives of each other and share
    the target equally. With one positive a pair, its floor would be the logarithm of the number of twins.

    All ranks call it, each with its own b pairs (b may differ, and may be 0), with grad mode and the gradient of the
    result the same on all. Gradients are those of the global loss after the data-parallel average over ranks.

    Args:
        image_embeds: (b, E), unit length.
        text_embeds: (b, E), unit length; row i belongs to image i.
        logit_scale: scalar, the logarithm of the inverse temperature (learned).
        match_ids: (b,) int64, equal for pairs that mean the same, on whatever rank; None (on all ranks) makes every
            pair its own (plain InfoNCE).
        chunk_size: rows of logits, of B columns each, that exist at a time; None makes all b at once.

    Returns:
        Scalar float32 (float64 from float64 embeddings), in nats, the same on all ranks; an exact zero, with a graph,
        where no rank has a pair. It can be differentiated once.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        loss: Tensor = _InfoNCE.apply(  # type: ignore[no-untyped-call]
            image_embeds.to(dtype),
            text_embeds.to(dtype),
            logit_scale.to(dtype),
            match_ids,
            chunk_size,
            torch.is_grad_enabled(),
        )
    return loss


@dataclass(frozen=True)
class _Logits:
    """This rank's rows of the table of logits.

    Attributes:
        images: (b, E).
        texts: (B, E).
        ids, text_ids: (b,) and (B,) int64.
        matched, text_matched: (b,) and (B,), every pair's own logit. Rows and columns are measured from it: the loss
            is the same, and digits are left where a temperature of 1/100 would have eaten them.
        scale: scalar, the inverse temperature.
        chunk_size: rows at a time.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    text_ids: Tensor
    matched: Tensor
    text_matched: Tensor
    scale: Tensor
    chunk_size: int

    def chunks(self) -> Iterator[Chunk]:
        """Rows and their (c, B) logits."""
        for start in range(0, len(self.images), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            yield rows, (self.images[rows] * self.scale) @ self.texts.t()

    def by_row(self, rows: slice, logits: Tensor) -> Tensor:
        """(c, B), each image's logits less that of its own pair."""
        return logits - self.matched[rows, None]

    def by_column(self, logits: Tensor) -> Tensor:
        """(c, B), each text's logits less that of its own pair."""
        return logits - self.text_matched

    def targets(self, rows: slice) -> Tensor:
        """(c, B) rows of probabilities; the equality of ids is symmetric, so they are the columns' targets as well."""
        equal = self.ids[rows, None] == self.text_ids
        return equal / equal.sum(1, keepdim=True, dtype=self.images.dtype)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        match_ids: Tensor | None,
        chunk_size: int | None,
        differentiated: bool,
    ) -> Tensor:
        shares = shares_of(len(images), images.device)
        ctx.world = shares.world
        if shares.total == 0:
            ctx.save_for_backward(torch.zeros_like(images), torch.zeros_like(texts), torch.zeros_like(logit_scale))
            return torch.zeros_like(logit_scale)
        scale = logit_scale.exp()
        ids, matched = ids_of(match_ids, shares, images.device), (images * texts).sum(1) * scale
        all_texts, all_ids, all_matched = gather_rows((texts, ids, matched), shares)
        table = _Logits(images, all_texts, ids, all_ids, matched, all_matched, scale, chunk_size or max(len(images), 1))
        kept = list(table.chunks()) if len(images) <= table.chunk_size else None  # one chunk is not made twice
        row_norms, column_norms, loss = _normalisers(table, kept or table.chunks())
        column_norms = _logsumexp_over_ranks(column_norms)
        sums = torch.stack((loss, torch.zeros_like(loss)))
        if differentiated:
            at_images, at_texts = _gradients(table, kept or table.chunks(), row_norms, column_norms)
            at_texts = scatter_sum(at_texts, shares)
            sums[1] = (at_images * images).sum()  # what logit_scale moves a logit by is the logit
        loss, at_scale = sum_over_ranks(sums).unbind()
        if differentiated:
            ctx.save_for_backward(at_images, at_texts, at_scale)
        return (loss + column_norms.sum()) / (2 * shares.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        at_images, at_texts, at_scale = ctx.saved_tensors
        # the average over ranks divides what each has for its own rows; the scale's gradient is whole on every rank
        share = upstream[0] * ctx.world
        return share * at_images, share * at_texts, upstream[0] * at_scale, None, None, None


def _normalisers(table: _Logits, chunks: Iterable[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of this rank's rows (b,) and of all columns over these rows (B,), and a part of the loss.

    The part is 2 B times this rank's share of the loss, without the columns' log-sum-exps.
    """
    row_norms = table.images.new_empty(len(table.images))
    column_norms = table.images.new_full((len(table.texts),), -torch.inf)
    pull = table.images.new_zeros(())
    for rows, logits in chunks:
        targets, by_row, by_column = table.targets(rows), table.by_row(rows, logits), table.by_column(logits)
        row_norms[rows] = by_row.logsumexp(1)
        column_norms = torch.logaddexp(column_norms, by_column.logsumexp(0))
        pull += (by_row.add_(by_column).mul_(targets)).sum()
    return row_norms, column_norms, row_norms.sum() - pull


def _gradients(
    table: _Logits, chunks: Iterable[Chunk], row_norms: Tensor, column_norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the global loss with respect to this rank's images (b, E), and, through these, to all texts (B, E)."""
    at_images, at_texts = torch.empty_like(table.images), torch.zeros_like(table.texts)
    weight = table.scale / (2 * len(table.texts))
    for rows, logits in chunks:
        errors = table.by_row(rows, logits).sub_(row_norms[rows, None]).exp_()
        errors += table.by_column(logits).sub_(column_norms).exp_()
        errors.sub_(table.targets(rows), alpha=2).mul_(weight)
        at_images[rows] = errors @ table.texts
        at_texts.addmm_(errors.t(), table.images[rows])
    return at_images, at_texts


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    if not is_distributed():
        return values
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most + sum_over_ranks((values - most).exp()).log()
