"""Token ids as integers: groups of bits, exact from 1 to 63 bits per group.

A token of L bits is K = L / group_size groups. Group 0 holds channels 0..group_size-1, and a group's first channel is
its most significant bit. All conversions are int64 shifts; no id passes through a float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlip.errors import QLIPError

MAX_GROUP_BITS = 63
"""Bits of an int64 without its sign."""


def bits_to_indices(bits: Tensor, group_size: int) -> Tensor:
    """Pack bits into group indices.

    Args:
        bits: (..., L) bool, or integers that are 0 or 1; channel 0 first.
        group_size: bits per group, 1 to 63, a divisor of L.

    Returns:
        (..., L / group_size) int64.

    Raises:
        QLIPError: ``group_size`` is out of range or does not divide L.
    """
    _check_group_size(bits.shape[-1], group_size)
    shifts = torch.arange(group_size - 1, -1, -1, device=bits.device)
    grouped = bits.to(torch.int64).unflatten(-1, (-1, group_size))
    return torch.bitwise_left_shift(grouped, shifts).sum(-1)  # spelled out, since ONNX has no << of tensors


def indices_to_bits(indices: Tensor, group_size: int) -> Tensor:
    """Unpack group indices into bits, the inverse of :func:`bits_to_indices`.

    Args:
        indices: (..., K) int64 in [0, 2^group_size).
        group_size: bits per group, 1 to 63.

    Returns:
        (..., K * group_size) bool.

    Raises:
        QLIPError: ``indices`` are not int64 or one is out of range.
    """
    check_indices(indices, group_size)
    shifts = torch.arange(group_size - 1, -1, -1, device=indices.device)
    return (torch.bitwise_right_shift(indices.unsqueeze(-1), shifts) & 1).bool().flatten(-2)


def regroup(indices: Tensor, group_size: int, *, from_group_size: int) -> Tensor:
    """Regroup bits into groups of another size, without loss.

    Args:
        indices: (..., K) int64 groups of ``from_group_size`` bits.
        group_size: bits per group of the result, a divisor of K * ``from_group_size``.
        from_group_size: bits per group of ``indices``.

    Returns:
        (..., K * from_group_size / group_size) int64.
    """
    return bits_to_indices(indices_to_bits(indices, from_group_size), group_size)


def check_indices(indices: Tensor, group_size: int) -> None:
    """Refuse ids that are not int64 or not in [0, 2^group_size). Under ``torch.compile`` only the dtype is checked."""
    if indices.dtype != torch.int64:
        raise QLIPError(f"indices must be int64, got {indices.dtype}; convert with .long()")
    if not isinstance(group_size, int) or not 1 <= group_size <= MAX_GROUP_BITS:
        raise QLIPError(f"group_size must be 1 to {MAX_GROUP_BITS}, got {group_size!r}")
    if torch.compiler.is_compiling() or indices.numel() == 0 or indices.is_meta:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >> group_size:
        bad = low if low < 0 else high
        raise QLIPError(f"index {bad} is out of range for groups of {group_size} bits: 0 to {2**group_size - 1}")


def _check_group_size(num_bits: int, group_size: int) -> None:
    if not isinstance(group_size, int) or not 1 <= group_size <= MAX_GROUP_BITS:
        raise QLIPError(f"group_size must be 1 to {MAX_GROUP_BITS}, got {group_size!r}")
    if num_bits % group_size:
        raise QLIPError(f"group_size {group_size} does not divide {num_bits} bits; choose a divisor")
