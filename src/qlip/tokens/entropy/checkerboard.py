"""Order in which an image's bits are coded, and the bits that each one's probability depends on.

Tokens are coloured like a chessboard: black where row + column is even, else white. Step s of the L + 1 steps codes
channel s of all black tokens and channel s - 1 of all white tokens at once. The bits of one step are a plane. The
number of steps does not depend on the grid. The probability of a bit depends on all earlier planes in the 3 x 3
neighbourhood of its token:

- of the token itself and of its four diagonal neighbours (same colour), the earlier channels;
- for a black token, of its four edge neighbours, the channels up to two before its own;
- for a white token, of its four edge neighbours, the channels up to its own.

As an input, a bit counts as +1 or -1; a place outside the grid, or without a bit in the plane, counts as 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEIGHBOURHOOD = 9
"""Places of a token's 3 x 3 neighbourhood, in raster order; the token itself is in the middle."""
EDGES = (1, 3, 5, 7)
"""The places that share an edge with the token; their tokens have the other colour."""
BLACK, WHITE = 0, 1


class Checkerboard(NamedTuple):
    """Tokens of a grid of N = h x w in the order of coding: first the black ones, then the white ones.

    Attributes:
        order: int64 (N,), raster position of each token.
        num_black: number of black tokens; at least one.
        neighbours: int64 (N, 9), index in the order of coding of each token's neighbours; N means outside the grid.
    """

    order: NDArray[np.int64]
    num_black: int
    neighbours: NDArray[np.int64]


@lru_cache(maxsize=4)
def coded_order(height: int, width: int, num_bits: int) -> NDArray[np.int64]:
    """Return the position of each bit, in the order of coding, among the bits of tokens in raster order.

    Returns:
        int64 (N * L,).
    """
    tokens = checkerboard(height, width)
    bits = tokens.order * num_bits + np.arange(num_bits)[:, None]  # (L, N)
    steps = np.full((num_bits + 1, height * width), -1)  # (L + 1, N)
    steps[:-1, : tokens.num_black] = bits[:, : tokens.num_black]
    steps[1:, tokens.num_black :] = bits[:, tokens.num_black :]
    positions = steps[steps >= 0]
    positions.setflags(write=False)
    return positions


@lru_cache(maxsize=16)
def checkerboard(height: int, width: int) -> Checkerboard:
    """Return the order of coding of a grid's tokens, with their neighbours."""
    rows, columns = np.divmod(np.arange(height * width), width)
    white = (rows + columns) % 2 == 1
    order = np.argsort(white, kind="stable")
    index = np.full((height + 2, width + 2), height * width)  # with a border of one token outside the grid
    index[1:-1, 1:-1].flat[order] = np.arange(height * width)
    offsets = [(row, column) for row in range(3) for column in range(3)]
    neighbours = np.stack([index[rows[order] + row, columns[order] + column] for row, column in offsets], axis=1)
    for array in (order, neighbours):
        array.setflags(write=False)  # cached: all callers share it
    return Checkerboard(order, int((~white).sum()), neighbours)
