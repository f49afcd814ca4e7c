"""The probabilities of the next bits of some images, given those that are coded: the tables at work.

All sums are of integers below 2^24 in size, kept in float32 for the sake of fast matrix products: whatever the order
and the machine, they are exact (`Tables` checks it).

Shapes: B images of N = n_black + n_white tokens of L bits, H hidden units. Rows are tokens: the black ones of all
images, then the white ones, of each image in the order of coding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qlip.tokens.contexts import AROUND, BESIDE, BLACK, Board, board
from qlip.tokens.tables import ONE, Tables

Floats = NDArray[np.float32]
_SIGN = np.array([-1, 1], dtype=np.float32)


class Weights:
    """Tables laid out for the sums below, each weight an integer over a power of two.

    A token's sums stand side by side: for each channel that of a black and that of a white token, then the hidden ones.
    Their changing bias comes in as the weight of a neighbour that is always 1.

    Args:
        tables: the integers.
    """

    def __init__(self, tables: Tables) -> None:
        bits, hidden = tables.num_bits, tables.hidden_around.shape[2]
        unit = np.float32(2.0 ** -int(tables.shift))
        linear = np.stack([tables.linear_around[0], tables.linear_around[1]], axis=-1).reshape(bits, AROUND, 2 * bits)
        self.num_bits, self.hidden = bits, hidden
        self.start = np.zeros((2, 2 * bits + hidden), np.float32)  # of a black and a white token
        middle = len(tables.probabilities) // 2
        self.start[:, : 2 * bits] = (tables.bias.T * unit + np.float32(middle)).ravel()
        self.start[:, 2 * bits :] = tables.hidden_bias[:, 0]
        self.updates: list[Floats] = []
        for channel in range(bits):
            rows = np.zeros((AROUND + 2, 2 * bits + hidden), np.float32)
            rows[:AROUND, : 2 * bits] = linear[channel] * unit
            rows[:AROUND, 2 * bits :] = tables.hidden_around[channel]
            if channel + 1 < bits:
                rows[AROUND:, 2 * bits :] = tables.hidden_bias[:, channel + 1] - tables.hidden_bias[:, channel]
            self.updates.append(np.ascontiguousarray(rows[:, 2 * (channel + 1) :]))
        self.output = tables.output * unit
        self.hidden_beside = tables.hidden_beside.astype(np.float32)
        self.linear_beside = tables.linear_beside * unit
        ones = tables.probabilities.astype(np.int64)
        self.pairs = np.stack([ONE - ones, ones], axis=1) / ONE  # float64 (T, 2), exact
        self.pairs.setflags(write=False)


class Predictor:
    """Goes through a batch of images of one grid, channel by channel, black before white.

    Ask `places` of a step, then `tell` it the bits.

    Args:
        weights: of the tables.
        grid: (height, width).
        num_images: B.
    """

    def __init__(self, weights: Weights, grid: tuple[int, int], num_images: int) -> None:
        self._weights, self._board = weights, board(*grid)
        self._around, self._beside = _rows(grid, num_images)
        rows, black = len(self._around), num_images * self._board.num_black
        self._plane = np.zeros(rows + 3, np.float32)  # a channel of all rows; outside; always 1 for black; for white
        self._plane[rows + 1 :] = 1
        self._sums = np.empty((rows, weights.start.shape[1]), np.float32)
        self._sums[:black], self._sums[black:] = weights.start
        self.rows = (slice(0, black), slice(black, rows))
        """The rows of each colour."""

    def places(self, channel: int, phase: int) -> NDArray[np.intp]:
        """Where in the list of probabilities the next bits' stand, before the list's ends hold them back; (rows,)."""
        weights, sums = self._weights, self._sums[self.rows[phase]]
        hidden = sums[:, 2 * weights.num_bits :]
        total: Floats = sums[:, 2 * channel + phase]
        if phase == BLACK:
            hidden = np.maximum(hidden, 0)
        else:
            beside = self._plane.take(self._beside)
            hidden = beside @ weights.hidden_beside[channel] + hidden
            np.maximum(hidden, 0, out=hidden)
            total = beside @ weights.linear_beside[channel] + total
        return (hidden @ weights.output[phase, channel] + total).astype(np.intp)

    def tell(self, channel: int, phase: int, bits: NDArray[np.int32]) -> None:
        """The bits of a step; after the white ones the sums of later channels take them in."""
        self._plane[self.rows[phase]] = _SIGN.take(bits)
        if phase == BLACK and len(bits) < len(self._around):
            return
        sums = self._sums[:, 2 * (channel + 1) :]
        np.add(sums, self._plane.take(self._around) @ self._weights.updates[channel], out=sums)


@lru_cache(maxsize=8)
def _rows(grid: tuple[int, int], num_images: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """For every row where in the plane its 9 neighbours and the two that are always 1 stand; for white ones the 4."""
    one: Board = board(*grid)
    tokens, black = len(one.order), one.num_black
    white, rows, image = tokens - black, num_images * tokens, np.arange(num_images)[:, None, None]

    def placed(around: NDArray[np.int64]) -> NDArray[np.intp]:
        moved = np.where(around < black, image * black, num_images * black + image * white - black) + around
        return np.where(around == tokens, rows, moved).reshape(-1, AROUND).astype(np.intp)

    parts = [placed(one.around[:black]), placed(one.around[black:])]
    constant = [np.full((len(part), 2), rows) for part in parts]
    constant[0][:, 0], constant[1][:, 1] = rows + 1, rows + 2
    around = np.concatenate([np.concatenate(pair, axis=1) for pair in zip(parts, constant, strict=True)])
    beside = np.ascontiguousarray(parts[1][:, list(BESIDE)])
    for array in (around, beside):
        array.setflags(write=False)
    return around, beside
