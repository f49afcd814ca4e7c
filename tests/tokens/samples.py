"""Token files for the tests of this folder."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from qlip.tokens import TokenFile

CODES = hashlib.sha256(b"codes").hexdigest()
DECODER = hashlib.sha256(b"decoder").hexdigest()


def random_indices(num_tokens: int, num_bits: int, group_size: int, seed: int) -> Tensor:
    """int64 (N, K), every bit drawn: no float between the generator and the id."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (num_tokens, num_bits // group_size, group_size), generator=generator)
    weights = torch.tensor([1 << (group_size - 1 - channel) for channel in range(group_size)])
    return (bits * weights).sum(-1)


def token_file(grid: tuple[int, int] = (8, 8), num_bits: int = 28, group_size: int = 7, seed: int = 0) -> TokenFile:
    """A file of random tokens; by default as large as the bundled model's."""
    return TokenFile.from_indices(
        random_indices(grid[0] * grid[1], num_bits, group_size, seed),
        group_size,
        grid=grid,
        original_size=(640, 480),
        code_fingerprint=CODES,
        decoder_fingerprint=DECODER,
    )
