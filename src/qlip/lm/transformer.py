"""Blocks of the decoder transformer: RMSNorm, rotary grouped-query attention, SwiGLU; LlamaGen's and Llama's rules.

Names of the weights are LlamaGen's. Shapes: B sequences, S positions, D width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.lm.cache import KVCache, StaticCache
from qlip.lm.rotary import rotate
from qlip.modeling.attention import attention
from qlip.modeling.transformer import Block

RUN_STEP = 64
"""Documents of one call of the attention differ in length by less."""


@dataclass(frozen=True)
class DocumentRuns:
    """Places of documents that follow one another in one row, so that each can attend to itself alone.

    With a dense mask, all pairs of positions would be multiplied; two documents that fill a row need a quarter of them.

    Attributes:
        shapes: n and L of n documents of at most L positions that attend in one call.
        places: (P,) int64, positions of these documents, call by call; the ends of shorter ones repeat their last
            position.
        repeated: int64, where repetitions stand in `places`.
        slots: (T,) int64, where each position stands in `places`.
    """

    shapes: tuple[tuple[int, int], ...]
    places: Tensor
    repeated: Tensor
    slots: Tensor

    @classmethod
    def of(cls, begins: Tensor) -> DocumentRuns:
        """Runs of documents of a row; `begins` is bool (T,), True at the first position of each."""
        starts = begins.nonzero()  # (documents, 1)
        lengths = torch.diff(starts, dim=0, append=starts.new_tensor([[len(begins)]]))
        sizes = lengths[:, 0] // RUN_STEP
        shapes, parts, real = [], [], []
        for size in sizes.unique():
            start, length = starts[sizes == size], lengths[sizes == size]
            inside = torch.arange(int(length.max()))
            shapes.append((len(start), len(inside)))
            parts.append((start + torch.minimum(inside, length - 1)).flatten())
            real.append((inside < length).flatten())
        places, kept = torch.cat(parts), torch.cat(real)
        slots = torch.empty(len(begins), dtype=torch.int64)
        slots[places[kept]] = kept.nonzero()[:, 0]
        return cls(tuple(shapes), places, (~kept).nonzero()[:, 0], slots)

    def split(self, x: Tensor) -> list[Tensor]:
        """Documents (n, H, L, d), call by call, of heads (1, H, T, d)."""
        rows = _Moved.apply(x[0].transpose(0, 1), self.places, self.slots, None)  # type: ignore[no-untyped-call]
        parts = rows.split([documents * length for documents, length in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def merge(self, parts: list[Tensor]) -> Tensor:
        """Heads (1, H, T, d) of documents (n, H, L, d), call by call."""
        rows: Tensor = torch.cat([one.transpose(1, 2).flatten(0, 1) for one in parts])  # (P, H, d)
        rows = _Moved.apply(rows, self.slots, self.places, self.repeated)  # type: ignore[no-untyped-call]
        return rows.transpose(0, 1)[None]


class _Moved(torch.autograd.Function):
    """Rows of a tensor by number. Its gradient is taken by number too, since PyTorch's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        found = gradients[0].index_select(0, back)
        return (found if unused is None else found.index_fill_(0, unused, 0.0)), None, None, None


Mask: TypeAlias = Tensor | DocumentRuns | None
"""Who sees whom; see `DecoderBlock.forward`."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, times the weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight


@torch.no_grad()
def initialize_module(module: nn.Module) -> None:
    """Start as stock models do: linear layers and embeddings normal of deviation 0.02, norms one."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, RMSNorm):
        nn.init.ones_(module.weight)


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions and as many or fewer key-value heads.

    Args:
        width: D.
        heads, kv_heads, head_width: of the attention.
        eps: of the norms.
        qk_norm: RMSNorm of queries and keys before rotation.
        dropout: of the attention weights.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, eps: float, qk_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.sizes = (heads * head_width, kv_heads * head_width, kv_heads * head_width)
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.wqkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.wo = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = RMSNorm(head_width, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_width, eps) if qk_norm else None

    def forward(
        self, x: Tensor, table: Tensor, mask: Mask, cache: KVCache | StaticCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, S, D) to (B, S, D); see :class:`DecoderBlock`."""
        q, k, v = self.wqkv(x).split(self.sizes, -1)
        q = q.unflatten(-1, (self.heads, -1))  # (B, S, H, d)
        k, v = (one.unflatten(-1, (self.kv_heads, -1)) for one in (k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, table), rotate(k, table)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))  # (B, H, S, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        merged = grouped_attention(q, k, v, mask, dropout)
        return self.wo(merged.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Causal attention of fewer key-value heads; each serves H / H_kv consecutive query heads."""
    if isinstance(mask, DocumentRuns):
        return _document_attention(q, k, v, mask, dropout)  # type: ignore[no-any-return]
    repeats, steps = q.shape[1] // k.shape[1], q.shape[2]
    if steps == 1 < repeats:  # one position sees all: the queries of a group are rows over the same keys
        grouped = q.unflatten(1, (k.shape[1], repeats)).flatten(2, 3)  # (B, H_kv, repeats, d)
        merged: Tensor = attention(grouped, k, v, mask=mask, dropout=dropout).unflatten(2, (repeats, 1))
        return merged.flatten(1, 2)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return attention(q, k, v, mask=mask, causal=mask is None and steps > 1, dropout=dropout)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # shapes differ from batch to batch
def _document_attention(q: Tensor, k: Tensor, v: Tensor, runs: DocumentRuns, dropout: float) -> Tensor:
    split = zip(runs.split(q), runs.split(k), runs.split(v), strict=True)
    return runs.merge([grouped_attention(*one, None, dropout) for one in split])


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class DecoderBlock(Block):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)), each with dropout on what is added.

    Args:
        width, inner: of the model and of its SwiGLU.
        heads, kv_heads, head_width: of the attention.
        eps: of the norms.
        qk_norm: norm queries and keys.
        attention_dropout, residual_dropout, ffn_dropout: probabilities.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        eps: float,
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps)
        self.attention = DecoderAttention(width, heads, kv_heads, head_width, eps, qk_norm, attention_dropout)
        self.ffn_norm = RMSNorm(width, eps)
        self.feed_forward = FeedForward(width, inner)
        self.residual_dropout, self.ffn_dropout = residual_dropout, ffn_dropout

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Mask = None,
        cache: KVCache | StaticCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Run the block on new positions.

        Args:
            x: (B, S, D).
            table: rotary table of these positions, (S, d / 2, 2) or (B, S, d / 2, 2).
            mask: additive, broadcastable to (B, H, S, positions so far), with the causal part, or without a cache the
                documents' runs; None is causal without padding, and then a cache must be empty or S 1.
            cache: keys and values of earlier positions, to which these are added.
            layer: number of this layer in the cache.

        Returns:
            (B, S, D).
        """
        attended = self.attention(self.attention_norm(x), table, mask, cache, layer)
        x = x + F.dropout(attended, self.residual_dropout, self.training)
        fed = self.feed_forward(self.ffn_norm(x))
        return x + F.dropout(fed, self.ffn_dropout, self.training)


class DecoderLayers(nn.ModuleList):
    """The transformer's blocks, one after the other."""

    def run(
        self,
        x: Tensor,
        table: Tensor,
        mask: Mask = None,
        cache: KVCache | StaticCache | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run all blocks; see :meth:`DecoderBlock.forward`.

        Args:
            x, table, mask, cache: of :class:`DecoderBlock`; the cache is not advanced.
            hidden_states: list to which every block's output is appended.
        """
        for number, layer in enumerate(self):
            x = layer(x, table, mask, cache, number)
            if hidden_states is not None:
                hidden_states.append(x)
        return x


def causal_mask(steps: int, past: int, start: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Additive mask of ``steps`` new positions behind ``past`` cached ones.

    A position sees itself and the earlier ones from its sequence's ``start`` on.

    Returns:
        (B or 1, 1, steps, past + steps), 0 or -inf; None where no mask is needed (no padding, and either one step or no
        past).
    """
    if start is None and (steps == 1 or not past):
        return None
    columns = torch.arange(past + steps, device=device)
    if start is not None:
        return padded_mask(columns < start[:, None], steps, dtype)
    return _additive(columns <= columns[past:, None], dtype)[None, None]


def padded_mask(padding: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Additive mask of the last ``steps`` positions of ``padding``, bool (B, L), True where only itself may see one.

    Returns:
        (B, 1, steps, L).
    """
    columns = torch.arange(padding.shape[1], device=padding.device)
    rows = columns[-steps:, None]
    seen = (columns == rows) | ((columns < rows) & ~padding[:, None])  # (B, steps, L)
    return _additive(seen, dtype)[:, None]


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T), 0 where a position sees another: an earlier one of its document, or itself."""
    seen = (documents[:, :, None] == documents[:, None]).tril_()  # (B, T, T)
    return _additive(seen, dtype)[:, None]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``seen``, and -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
