"""Token files for the tests of this folder."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip.tokens import Tables, TokenFile

CODES = hashlib.sha256(b"codes").hexdigest()
DECODER = hashlib.sha256(b"decoder").hexdigest()
PREPARATION = "0123456789abcdef"


def random_indices(num_tokens: int, num_bits: int, group_size: int, seed: int) -> Tensor:
    """Draw indices, int64 (N, K), bit by bit and without floats."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (num_tokens, num_bits // group_size, group_size), generator=generator)
    weights = torch.tensor([1 << (group_size - 1 - channel) for channel in range(group_size)])
    return (bits * weights).sum(-1)


def token_file(
    grid: tuple[int, int] = (8, 8), num_bits: int = 28, group_size: int = 7, seed: int = 0, **version_2: Any
) -> TokenFile:
    """Make a file of random tokens; by default as large as the bundled model's, in version 1 of the format."""
    return TokenFile.from_indices(
        random_indices(grid[0] * grid[1], num_bits, group_size, seed),
        group_size,
        grid=grid,
        original_size=(640, 480),
        code_fingerprint=CODES,
        decoder_fingerprint=DECODER,
        **version_2,
    )


def entropy_tables(num_bits: int = 7, hidden: int = 3, seed: int = 0, bias: int = 0, scale_down: int = 1) -> Tables:
    """Make random tables. A negative bias makes ones rare; the other weights are divided by ``scale_down``."""
    draw = random.Random(seed)

    def drawn(shape: tuple[int, ...], largest: int, dtype: type[np.integer[Any]]) -> NDArray[Any]:
        flat = [draw.randrange(-largest, largest + 1) // scale_down for _ in range(math.prod(shape))]
        return np.array(flat, dtype).reshape(shape)

    known = np.stack([np.triu(np.ones((num_bits, num_bits), np.int16), 1 - colour) for colour in (0, 1)])
    return Tables(
        hidden_around=drawn((2, num_bits, 9, hidden), 40, np.int16),
        hidden_bias=drawn((2, num_bits, hidden), 300, np.int32),
        output=drawn((2, num_bits, hidden), 30, np.int16),
        linear_around=drawn((2, num_bits, 9, num_bits), 300, np.int16) * known[:, :, None],
        bias=drawn((2, num_bits), 500, np.int32) + np.int32(bias),
        probabilities=np.array([65536 // 64 * n + 500 for n in range(64)], np.uint16),
        shift=np.array(8, np.int32),
    )


def rare_ones(num_bytes: int, seed: int) -> bytes:
    """Draw bytes whose bits are 1 with a probability of 1/8: packed tokens of a multiple of eight bits."""
    draw = random.Random(seed)
    return bytes(draw.randbytes(1)[0] & draw.randbytes(1)[0] & draw.randbytes(1)[0] for _ in range(num_bytes))
