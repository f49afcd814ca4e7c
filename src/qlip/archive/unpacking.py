"""Many rows of packed tokens to indices at once: the same as `qlip.tokens.unpack_batch`, several times faster.

Shapes: B rows, S bytes a row, N tokens, K groups a token, G bits a group, L = K * G bits a token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip.errors import QLIPError
from qlip.tokens.packing import packed_size, unpack_batch

WIDEST = 56
"""Bits of a group that lie within 8 bytes wherever they begin."""

Bytes = NDArray[np.uint8]


def unpack_rows(packed: Bytes, num_tokens: int, num_bits: int, group_size: int) -> Tensor:
    """Unpack rows of one size.

    A group lies within a few bytes: these are gathered for all groups of all rows, joined, and shifted into place.

    Args:
        packed: (B, S) uint8, S = `packed_size(num_tokens, num_bits)`.
        num_tokens: N.
        num_bits: L.
        group_size: G, any divisor of L.

    Returns:
        int64 (B, N, K).

    Raises:
        QLIPError: the wrong number of bytes, padding that is not zero, or a group size that does not divide.
    """
    size = packed_size(num_tokens, num_bits)
    if packed.ndim != 2 or packed.shape[1] != size or num_bits % group_size or group_size > WIDEST:
        rows = [row.tobytes() for row in packed]  # the plain way, which also says what is wrong
        return unpack_batch(rows, num_tokens, num_bits, group_size)
    padding = 8 * size - num_tokens * num_bits
    if padding and (packed[:, -1] & ((1 << padding) - 1)).any():
        raise QLIPError(f"the last {padding} bits are padding and must be zero; these bytes were packed otherwise")
    begins, shifts, count = _places(num_tokens, num_bits, group_size)
    values = packed[:, begins].astype(np.int64)
    for step in range(1, count):
        values <<= 8
        values |= packed[:, np.minimum(begins + step, size - 1)]  # past the end come bits that the shift drops
    values >>= shifts
    values &= (1 << group_size) - 1
    return torch.from_numpy(values).view(len(packed), num_tokens, num_bits // group_size)


@lru_cache(maxsize=64)
def _places(num_tokens: int, num_bits: int, group_size: int) -> tuple[NDArray[Any], NDArray[Any], int]:
    """For each group of a row its first byte, how far its bits are from the end of the bytes read, and their number."""
    bits = np.arange(0, num_tokens * num_bits, group_size, dtype=np.int64)
    begins, inside = bits // 8, bits % 8
    count = int((inside.max(initial=0) + group_size + 7) // 8)
    return begins, 8 * count - inside - group_size, count
