"""Tokens as bytes: the bits of all tokens in order, nothing between them.

Channel 0 of token 0 is the first byte's most significant bit. What is left of the last byte is zero.

Shapes: B images, N tokens, K groups a token, G bits a group, L = K * G bits a token (1 to 63).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.indices import bits_to_indices, indices_to_bits

MAX_BITS = 63  # a token's bits fit one int64


def packed_size(num_tokens: int, num_bits: int) -> int:
    """Bytes that `num_tokens` tokens of `num_bits` bits take."""
    return (num_tokens * num_bits + 7) // 8


def pack(indices: Tensor, group_size: int) -> bytes:
    """Pack one image's indices.

    Args:
        indices: int64 (N, K), each in [0, 2^group_size).
        group_size: bits a group; K * group_size is 1 to 63.

    Raises:
        QLIPError: another dtype or shape, an index out of range, or too many bits a token.
    """
    if indices.ndim != 2:
        raise QLIPError(f"one image's indices have shape (N, K), not {tuple(indices.shape)}")
    return pack_batch(indices[None], group_size)[0]


def pack_batch(indices: Tensor, group_size: int) -> list[bytes]:
    """Pack a batch of images' indices, int64 (B, N, K), each image to its own bytes (see `pack`)."""
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
        num_bits: bits a token, L.
        group_size: bits a group, any divisor of `num_bits`: it need not be the one that was packed.

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


def check_packed(data: bytes, num_tokens: int, num_bits: int) -> None:
    """Refuse bytes that are not `num_tokens` packed tokens of `num_bits` bits.

    Raises:
        QLIPError: bits a token out of range, the wrong number of bytes, or padding that is not zero.
    """
    _check_bits(num_bits)
    if num_tokens < 0:
        raise QLIPError(f"the number of tokens is 0 or more, not {num_tokens}")
    size = packed_size(num_tokens, num_bits)
    if len(data) != size:
        raise QLIPError(f"{num_tokens:,} tokens of {num_bits} bits take {size:,} bytes, not {len(data):,}")
    padding = 8 * size - num_tokens * num_bits
    if padding and data[-1] & ((1 << padding) - 1):
        raise QLIPError(f"the last {padding} bits are padding and must be zero; these bytes were packed otherwise")


def _check_bits(num_bits: int) -> None:
    if not isinstance(num_bits, int) or not 1 <= num_bits <= MAX_BITS:
        raise QLIPError(f"a token has 1 to {MAX_BITS} bits, an int, not {num_bits!r}")
