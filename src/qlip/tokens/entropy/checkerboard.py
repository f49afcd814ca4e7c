"""The order in which bits are coded, and the context of each: the bits that are known when it is coded.

Tokens are coloured like a chessboard, black where row + column is even, and all are coded at once, channel by channel,
the white ones a channel behind: step s codes channel s of the black tokens and channel s - 1 of the white ones, in
L + 1 steps for a grid of any size. The bits of a step are a plane; each bit is coded knowing all earlier planes in its
token's 3 x 3 neighbourhood. So it knows the earlier channels of its own token and of those that touch its corners; a
black one, of the tokens that share an edge, all channels but the last before it; a white one of these its own channel
too.

A bit counts as +1 or -1 here, and as 0 what lies outside the grid or is not in the plane.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AROUND = 9
"""A token's 3 x 3 neighbourhood in raster order, itself in the middle."""
SIDES = (1, 3, 5, 7)
"""The four of these places that share an edge with the token; they have the other colour."""
BLACK, WHITE = 0, 1


class Board(NamedTuple):
    """A grid of h x w tokens, black squares first.

    Attributes:
        order: int64 (N,), the raster position of the n-th token in the order of coding.
        num_black: how many of them are black; at least one.
        around: int64 (N, 9), where a token's neighbours stand in the order of coding; N means outside the grid.
    """

    order: NDArray[np.int64]
    num_black: int
    around: NDArray[np.int64]


@lru_cache(maxsize=4)
def coded_order(height: int, width: int, num_bits: int) -> NDArray[np.int64]:
    """Positions of the bits in coding order among an image's bits in raster order, int64 (N * L,)."""
    one = board(height, width)
    bits = one.order * num_bits + np.arange(num_bits)[:, None]  # (L, N)
    steps = np.full((num_bits + 1, height * width), -1)
    steps[:-1, : one.num_black], steps[1:, one.num_black :] = bits[:, : one.num_black], bits[:, one.num_black :]
    found = steps[steps >= 0]
    found.setflags(write=False)
    return found


@lru_cache(maxsize=16)
def board(height: int, width: int) -> Board:
    """The order of coding of a grid."""
    rows, columns = np.divmod(np.arange(height * width), width)
    white = (rows + columns) % 2 == 1
    order = np.argsort(white, kind="stable")
    place = np.full((height + 2, width + 2), height * width)
    place[1:-1, 1:-1].flat[order] = np.arange(height * width)
    offsets = [(row, column) for row in range(3) for column in range(3)]
    around = np.stack([place[rows[order] + row, columns[order] + column] for row, column in offsets], axis=1)
    for array in (order, around):
        array.setflags(write=False)  # shared by all who ask
    return Board(order, int((~white).sum()), around)
