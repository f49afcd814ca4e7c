"""Tokens as bytes: the bits of all tokens in order, nothing between them.

Channel 0 of token 0 is the first byte's most significant bit. The unused bits of the last byte are 0.

Shapes: B images, N tokens, K groups per token, G bits per group, L = K * G bits per token (1 to 63).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.modeling.indices import bits_to_indices, indices_to_bits

MAX_BITS = 63  # a token's bits fit one int64
MAX_GATHERED_BITS = 56
"""Largest group whose bits always lie within 8 bytes."""


def packed_size(num_tokens: int, num_bits: int) -> int:
    """Return the size in bytes of `num_tokens` packed tokens of `num_bits` bits."""
    return (num_tokens * num_bits + 7) // 8


def pack(indices: Tensor, group_size: int) -> bytes:
    """Pack one image's indices.

    Args:
        indices: int64 (N, K), each in [0, 2^group_size).
        group_size: bits per group; K * group_size is 1 to 63.

    Raises:
        QLIPError: another dtype or shape, an index out of range, or too many bits per token.
    """
    _check_tensor(indices, group_size)
    if indices.ndim != 2:
        raise QLIPError(f"one image's indices have shape (N, K), not {tuple(indices.shape)}")
    return pack_batch(indices[None], group_size)[0]


def pack_batch(indices: Tensor, group_size: int) -> list[bytes]:
    """Pack a batch of images' indices, int64 (B, N, K), each image to its own bytes (see `pack`)."""
    _check_tensor(indices, group_size)
    if indices.ndim != 3:
        raise QLIPError(f"a batch's indices have shape (B, N, K), not {tuple(indices.shape)}")
    _check_bits(indices.shape[-1] * group_size)
    bits = indices_to_bits(indices, group_size)  # (B, N, L)
    rows = np.packbits(bits.flatten(1).cpu().numpy(), axis=1)  # (B, packed_size)
    return [row.tobytes() for row in rows]


def unpack(data: bytes, num_tokens: int, num_bits: int, group_size: int) -> Tensor:
    """Unpack one image's indices.

    Args:
        data: what `pack` made, exactly `packed_size(num_tokens, num_bits)` bytes.
        num_tokens: N.
        num_bits: bits per token, L.
        group_size: bits per group, any divisor of `num_bits`: it need not be the one that was packed.

    Returns:
        int64 (N, K), K = num_bits / group_size.

    Raises:
        QLIPError: the wrong number of bytes, padding that is not zero, or a group size that does not divide.
    """
    return unpack_batch([data], num_tokens, num_bits, group_size)[0]


def unpack_batch(images: Sequence[bytes], num_tokens: int, num_bits: int, group_size: int) -> Tensor:
    """Unpack images of one size to int64 (B, N, K) (see `unpack`)."""
    for data in images:
        check_packed(data, num_tokens, num_bits)
    size = packed_size(num_tokens, num_bits)
    packed = np.frombuffer(b"".join(images), dtype=np.uint8).reshape(len(images), size)
    bits = np.unpackbits(packed, axis=1, count=num_tokens * num_bits).view(np.bool_)
    return bits_to_indices(torch.from_numpy(bits).view(len(images), num_tokens, num_bits), group_size)


def unpack_rows(packed: NDArray[np.uint8], num_tokens: int, num_bits: int, group_size: int) -> Tensor:
    """Unpack like `unpack_batch`, several times faster, from rows of an array.

    A group lies within a few bytes. These are gathered for all groups of all rows, joined, and shifted into place.

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
    if packed.ndim != 2 or packed.shape[1] != size or num_bits % group_size or group_size > MAX_GATHERED_BITS:
        rows = [row.tobytes() for row in packed]  # the slow way, whose checks name the error
        return unpack_batch(rows, num_tokens, num_bits, group_size)
    padding = 8 * size - num_tokens * num_bits
    if padding and (packed[:, -1] & ((1 << padding) - 1)).any():
        raise QLIPError(f"the last {padding} bits are padding and must be zero; these bytes were packed in another way")
    begins, shifts, count = _places(num_tokens, num_bits, group_size)
    values = packed[:, begins].astype(np.int64)
    for step in range(1, count):
        values <<= 8
        values |= packed[:, np.minimum(begins + step, size - 1)]  # bits from past the end are shifted out
    values >>= shifts
    values &= (1 << group_size) - 1
    return torch.from_numpy(values).view(len(packed), num_tokens, num_bits // group_size)


@lru_cache(maxsize=64)
def _places(num_tokens: int, num_bits: int, group_size: int) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return each group's first byte, the shift that moves its bits to the end, and the number of bytes to read."""
    bits = np.arange(0, num_tokens * num_bits, group_size, dtype=np.int64)
    begins, inside = bits // 8, bits % 8
    count = int((inside.max(initial=0) + group_size + 7) // 8)
    return begins, 8 * count - inside - group_size, count


def check_packed(data: bytes, num_tokens: int, num_bits: int) -> None:
    """Refuse bytes that are not `num_tokens` packed tokens of `num_bits` bits.

    Raises:
        QLIPError: bits per token out of range, the wrong number of bytes, or padding that is not zero.
    """
    _check_bits(num_bits)
    if not isinstance(data, bytes | bytearray):
        raise QLIPError(f"packed tokens are bytes, not {type(data).__name__}")
    check_integer("num_tokens", num_tokens, 0)
    size = packed_size(num_tokens, num_bits)
    if len(data) != size:
        raise QLIPError(f"{num_tokens:,} tokens of {num_bits} bits take {size:,} bytes, not {len(data):,}")
    padding = 8 * size - num_tokens * num_bits
    if padding and data[-1] & ((1 << padding) - 1):
        raise QLIPError(f"the last {padding} bits are padding and must be zero; these bytes were packed in another way")


def _check_tensor(indices: object, group_size: object) -> None:
    if not isinstance(indices, Tensor):
        raise QLIPError(f"indices are an int64 tensor, not {type(indices).__name__}; torch.as_tensor makes one")
    if not isinstance(group_size, int):
        raise QLIPError(f"group_size {group_size!r}: give an integer")


def _check_bits(num_bits: int) -> None:
    if not isinstance(num_bits, int) or not 1 <= num_bits <= MAX_BITS:
        raise QLIPError(f"a token has 1 to {MAX_BITS} bits, an int, not {num_bits!r}")
