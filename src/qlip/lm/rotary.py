"""Rotary positions of the decoder: tables of cosines and sines, and the rotation.

Adjacent lanes are a pair, as in LlamaGen and lingua; Llama pairs lane i with i + d/2, which is a permutation of the
rows of the query and key projections (:mod:`qlip.lm.export`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlip.lm.causal_config import CausalConfig
from qlip.lm.config import DecoderConfig


def frequencies(config: DecoderConfig) -> tuple[float, ...]:
    """Radians per position for each pair of lanes of a 1-D rotary embedding.

    ``1d``: base^(-2i/d). ``raster``: the first half of the pairs turns by 2 pi m / P per step, m = 1, 2, ..., where P
    is the number of steps of a row of tokens, so that a pair has the same angle in each row at the same column; m
    starts again at 1 beyond P/2. The second half turns by base^(-4i/d) / P, so by at most one radian per row.

    Returns:
        d / 2 values.
    """
    pairs = config.head_width // 2
    if config.rotary_frequencies is not None:
        return config.rotary_frequencies
    if config.rotary == "1d":
        return tuple(config.rotary_base ** (-i / pairs) for i in range(pairs))
    period = config.grid[1] * config.num_groups // config.groups_per_step
    half = pairs // 2
    highest = max(1, period // 2)
    columns = [2 * math.pi * (1 + i % highest) / period for i in range(half)]
    rows = [config.rotary_base ** (-i / half) / period for i in range(half)]
    return (*columns, *rows)


def wavelengths(config: DecoderConfig) -> tuple[float, ...]:
    """Positions per radian for each pair of lanes: the inverse of :func:`frequencies`, at most 1e30."""
    return tuple(1 / turn if abs(turn) > 1e-30 else 1e30 for turn in frequencies(config))


def rotary_table(config: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """Cosines and sines for all positions of a sequence.

    Returns:
        (T + S, d / 2, 2) float32: cosine and sine per pair of lanes, the prefix first.
    """
    pairs, prefix, steps = config.head_width // 2, config.prefix_length, config.num_steps
    if config.rotary == "axial":
        turns = _exact_powers(config.rotary_base, pairs, device)  # (d / 4,)
        token = torch.arange(steps, device=device) // (config.num_groups // config.groups_per_step)
        angles = torch.cat(
            [torch.outer(at.float(), turns) for at in (token // config.grid[1], token % config.grid[1])], 1
        )
        angles = torch.cat([angles.new_zeros(prefix, pairs), angles])
    else:
        if config.rotary == "1d":
            turns = _powers(config.rotary_base, config.head_width, device)
        else:  # by way of float32 wavelengths, which a stock config.json holds: an export turns by these very numbers
            turns = 1.0 / torch.tensor(wavelengths(config), device=device, dtype=torch.float32)
        angles = torch.outer(torch.arange(prefix + steps, device=device, dtype=torch.float32), turns)
    table = torch.stack([angles.cos(), angles.sin()], -1)  # (T + S, d / 2, 2)
    if config.prefix_rotary == "zero":
        table[:prefix] = 0
    elif config.prefix_rotary == "identity":
        table[:prefix] = table.new_tensor([1.0, 0.0])
    return table


def causal_frequencies(config: CausalConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position for each pair of lanes, (d / 2,) float32, computed as transformers does."""
    turns = _powers(config.rope_theta, config.head_width, device)
    scaling = config.rope_scaling
    if scaling is None:
        return turns
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rounds = scaling.original_max_position_embeddings / (2 * math.pi / turns)  # in the original context
    kept = ((rounds - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turns / scaling.factor + kept * turns


def turn_table(positions: Tensor, turns: Tensor) -> Tensor:
    """Cosines and sines at any positions.

    Args:
        positions: (T,) or (B, T) int64.
        turns: (d / 2,) float32, radians per position for each pair of lanes.

    Returns:
        (T, d / 2, 2) or (B, T, d / 2, 2) float32.
    """
    angles = positions[..., None].float() * turns
    return torch.stack([angles.cos(), angles.sin()], -1)


def _powers(base: float, lanes: int, device: torch.device | None) -> Tensor:
    """base^(-2i / lanes) for i = 0 .. lanes / 2 - 1, in float32 as transformers computes it on this machine."""
    return 1.0 / (base ** (torch.arange(0, lanes, 2, device=device, dtype=torch.float32) / lanes))


def _exact_powers(base: float, lanes: int, device: torch.device | None) -> Tensor:
    """See `_powers`; each power is rounded from float64, so all machines have LlamaGen's published angles.

    PyTorch's power in float32 differs between CPUs in the last bit, which row 23 makes 2e-6 of a radian.
    """
    exponents = (torch.arange(0, lanes, 2, device="cpu", dtype=torch.float32) / lanes).tolist()
    return 1.0 / torch.tensor([base**one for one in exponents], device=device, dtype=torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of adjacent lanes, in float32: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: (B, S, H, d).
        table: (S, d / 2, 2), or (B, S, d / 2, 2), float32.

    Returns:
        (B, S, H, d), of the dtype of ``x``.
    """
    cos, sin = table.unsqueeze(-3).unbind(-1)  # (..., S, 1, d / 2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, H, d / 2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
