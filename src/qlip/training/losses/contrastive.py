"""L_align: symmetric InfoNCE (CLIP, arXiv 2103.00020) over the global batch, with targets shared among equal pairs.

The (B, B) matrix of logits is never materialised. Each rank computes the logits of its b images against the texts of
all ranks, one chunk of rows at a time. A first pass over the chunks computes the normalisers of rows and columns (those
of columns are reduced over chunks and ranks). If gradients are needed, a second pass recomputes each chunk and turns it
into gradients. Only gradients of the embeddings are saved for the backward pass.
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
    """Contrastive loss of the B matched pairs of all ranks, in float32 even under autocast.

    Pairs with the same meaning (equal captions, or one class) are positives of each other and share the target equally.
    With one positive per pair, the minimum of the loss would be the logarithm of the number of equal pairs.

    A collective: all ranks call it, each with its own b pairs (b may differ, and may be 0); grad mode and the gradient
    of the result must be equal on all. After the data-parallel average over ranks, gradients are those of the global
    loss.

    Args:
        image_embeds: (b, E), unit length.
        text_embeds: (b, E), unit length; row i belongs to image i.
        logit_scale: scalar, the logarithm of the inverse temperature (learned).
        match_ids: (b,) int64, equal for pairs with the same meaning, across ranks; None (on all ranks) treats all pairs
            as different (plain InfoNCE).
        chunk_size: rows of logits, with B columns each, in memory at a time; None means all b rows.

    Returns:
        Scalar float32 (float64 from float64 embeddings), in nats, equal on all ranks; exactly zero, with a graph, if
        no rank has a pair. It can be differentiated once.
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
    """Rows of the matrix of logits that belong to this rank.

    Attributes:
        images: (b, E).
        texts: (B, E).
        ids, text_ids: (b,) and (B,) int64.
        matched, text_matched: (b,) and (B,), the logit of each matched pair. It is subtracted from rows and columns,
            which does not change the loss but keeps precision at temperatures as low as 1/100.
        scale: scalar, the inverse temperature.
        chunk_size: number of rows per chunk.
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
        """Yield slices of c rows, and their (c, B) logits."""
        for start in range(0, len(self.images), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            yield rows, (self.images[rows] * self.scale) @ self.texts.t()

    def by_row(self, rows: slice, logits: Tensor) -> Tensor:
        """Logits minus that of the image's matched pair, (c, B)."""
        return logits - self.matched[rows, None]

    def by_column(self, logits: Tensor) -> Tensor:
        """Logits minus that of the text's matched pair, (c, B)."""
        return logits - self.text_matched

    def targets(self, rows: slice) -> Tensor:
        """Target probabilities of the rows, (c, B); id equality is symmetric, so they are the column targets too."""
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
        kept = list(table.chunks()) if len(images) <= table.chunk_size else None  # a single chunk is not recomputed
        row_norms, column_norms, loss = _normalisers(table, kept or table.chunks())
        column_norms = _logsumexp_over_ranks(column_norms)
        sums = torch.stack((loss, torch.zeros_like(loss)))
        if differentiated:
            at_images, at_texts = _gradients(table, kept or table.chunks(), row_norms, column_norms)
            at_texts = scatter_sum(at_texts, shares)
            sums[1] = (at_images * images).sum()  # d logit / d logit_scale is the logit itself
        loss, at_scale = sum_over_ranks(sums).unbind()
        if differentiated:
            ctx.save_for_backward(at_images, at_texts, at_scale)
        return (loss + column_norms.sum()) / (2 * shares.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        at_images, at_texts, at_scale = ctx.saved_tensors
        # undo the average over ranks for per-row gradients; the scale's gradient is already global on every rank
        share = upstream[0] * ctx.world
        return share * at_images, share * at_texts, upstream[0] * at_scale, None, None, None


def _normalisers(table: _Logits, chunks: Iterable[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of this rank's rows, (b,), and of all columns over these rows, (B,), and a partial loss.

    The partial loss is 2 B times this rank's share of the loss, without the log-sum-exps of columns.
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
    """Gradients of the global loss at this rank's images, (b, E), and through them at all texts, (B, E)."""
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
    """Elementwise log-sum-exp over ranks, stable against overflow."""
    if not is_distributed():
        return values
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most + sum_over_ranks((values - most).exp()).log()
