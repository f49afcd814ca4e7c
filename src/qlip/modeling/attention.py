"""Attention and rotary embeddings: one entry point over PyTorch's kernels.

Shape suffixes: B batch, H heads, N tokens, D width, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.modeling.config import TowerConfig

ROPE_BASE = 10000.0
ROPE_GRID = 16
"""Units that rotary coordinates span per side, for every grid size: the published tables are scaled to it."""


def attention(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention; every attention of the model goes through this function.

    Args:
        q_BHNd, k_BHNd, v_BHNd: (B, H, N, d) floating; queries are not scaled yet.
        mask: additive, broadcastable to (B, H, N, N), same dtype; it already contains the causal part, if any.
        causal: position i sees positions up to i; give either this or ``mask``.
        dropout: probability, on the attention weights.

    Returns:
        (B, H, N, d), of the dtype of the values.
    """
    if v_BHNd.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # PyTorch's CPU kernel goes backward several times more slowly in bfloat16 than in float32 (docs/log.md)
        with torch.autocast("cpu", enabled=False):
            mask = None if mask is None else mask.float()
            mixed = F.scaled_dot_product_attention(
                q_BHNd.float(), k_BHNd.float(), v_BHNd.float(), attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
            return mixed.to(v_BHNd.dtype)
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def causal_padding_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """CLIP's additive mask: the most negative number above the diagonal, and again at padding.

    Args:
        attention_mask: (B, N) integers or bool, 0 at padding.
        dtype: the result's dtype.

    Returns:
        (B, 1, N, N).
    """
    length = attention_mask.shape[-1]
    lowest = torch.finfo(dtype).min
    causal = torch.full((length, length), lowest, dtype=dtype, device=attention_mask.device).triu(1)
    padding = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    padding = padding.masked_fill(attention_mask == 0, lowest)
    # the sum of both is -inf; no row is all -inf, since the causal part is 0 on the diagonal
    return causal + padding[:, None, None, :]  # (B, 1, N, N)


def rope_tables(
    grid: tuple[int, int], head_dim: int, num_prefix: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2-D rotary embedding.

    The first half of a head's lanes rotates with the row, the second with the column; adjacent lanes are a pair.

    Args:
        grid: rows and columns of patches; coordinates are scaled per axis so that each spans ``ROPE_GRID`` units.
        head_dim: d, a multiple of 4.
        num_prefix: tokens before the patches that are not rotated ([CLS]); their angle is zero.
        device: the tables' device.

    Returns:
        Two (num_prefix + rows * columns, d / 2) float32 tensors, one value per pair of lanes.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    frequencies = 1.0 / (ROPE_BASE**exponents)  # (d / 4,)
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) / n * ROPE_GRID for n in grid)
    row_angles = torch.outer(rows, frequencies)[:, None, :].expand(-1, grid[1], -1)
    column_angles = torch.outer(columns, frequencies)[None, :, :].expand(grid[0], -1, -1)
    angles = torch.cat((row_angles, column_angles), -1).flatten(0, 1)  # (rows * columns, d / 2)
    angles = F.pad(angles, (0, 0, num_prefix, 0))
    return angles.cos(), angles.sin()


def rotate(x_BNHd: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs of lanes by the tables' angles: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x_BNHd: (B, N, H, d).
        tables: from :func:`rope_tables`, (N, d / 2) each.
    """
    cos, sin = (table.to(x_BNHd.dtype)[:, None, :] for table in tables)  # (N, 1, d / 2)
    first, second = x_BNHd.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, H, d / 2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with the checkpoint's names; ``inner_attn_ln`` is sub-LN's norm before ``out_proj``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=config.q_bias)
        self.k_proj = nn.Linear(width, width, bias=config.k_bias)
        self.v_proj = nn.Linear(width, width, bias=config.v_bias)
        self.inner_attn_ln = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.subln else None
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x_BND: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        q, k, v = (
            projection(x_BND).unflatten(-1, (self.num_heads, -1))  # (B, N, H, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, N, d)
        dropout = self.dropout if self.training else 0.0
        merged = attention(q, k, v, mask=mask, causal=causal, dropout=dropout).transpose(1, 2).flatten(-2)
        if self.inner_attn_ln is not None:
            merged = self.inner_attn_ln(merged)
        return self.out_proj(merged)  # type: ignore[no-any-return]
