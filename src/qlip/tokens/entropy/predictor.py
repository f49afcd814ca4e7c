"""Probabilities of the next bits of a batch of images, given the bits that are coded already.

All sums are of integers below 2^24 in size, kept in float32 for fast matrix products: in any order and on any
machine they are exact (`Tables` checks it).

Shapes: B images of N tokens, black ones first (`contexts.Board`), L bits per token, H hidden units.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.tokens.entropy.checkerboard import AROUND, BLACK, WHITE, board
from qlip.tokens.entropy.tables import ONE, Tables

Floats = NDArray[np.float32]
_SIGN = np.array([-1, 1], dtype=np.float32)


class Weights:
    """Tables laid out for the sums below, each weight an integer over a power of two.

    Sums stand by step, white tokens' a row below their channel, so that a step takes one row of both colours; under the
    L + 1 rows follow the H hidden ones. A plane updates all rows from the next step's on in one matrix product. The
    changing bias of the hidden sums comes in as the weight of a tenth neighbour that is always 1.

    Attributes:
        updates: by plane, float32 (2, L - plane + H, 10).
        start: the sums before the first plane, float32 (2, L + 1 + H).
        output: by step, float32 (2, 1, H).
        pairs: float64 (T, 2), the probabilities of 0 and 1.
    """

    def __init__(self, tables: Tables) -> None:
        bits, hidden = tables.num_bits, tables.hidden_around.shape[3]
        self.num_bits, self.hidden = bits, hidden
        unit = np.float32(2.0 ** -int(tables.shift))
        bias, output = _white_a_step_later(tables.bias), _white_a_step_later(tables.output)
        hidden_bias = _white_a_step_later(tables.hidden_bias.astype(np.int64))
        hidden_bias[WHITE, 0] = hidden_bias[WHITE, 1]  # nothing is coded then: no change at the first plane
        self.start = np.empty((2, bits + 1 + hidden), np.float32)
        self.start[:, : bits + 1] = bias * unit + np.float32(len(tables.probabilities) // 2)
        self.start[:, bits + 1 :] = hidden_bias[:, 0]
        self.output: list[Floats] = [one[:, None] for one in np.ascontiguousarray((output * unit).swapaxes(0, 1))]
        self.updates: list[Floats] = []
        linear = _white_a_step_later(np.ascontiguousarray(tables.linear_around.transpose(0, 3, 1, 2)))  # 2, step, plane
        for plane in range(bits):
            later = bits - plane  # steps
            rows = np.zeros((2, later + hidden, AROUND + 1), np.float32)
            rows[:, :later, :AROUND] = linear[:, plane + 1 :, plane] * unit
            rows[:, later:, :AROUND] = tables.hidden_around[:, plane].swapaxes(1, 2)
            rows[:, later:, AROUND] = hidden_bias[:, plane + 1] - hidden_bias[:, plane]
            if plane + 1 == bits:
                rows[BLACK, later:, AROUND] = 0  # all are coded
            self.updates.append(rows)
        ones = tables.probabilities.astype(np.int64)
        self.pairs = np.stack([ONE - ones, ones], axis=1) / ONE  # exact
        self.pairs.setflags(write=False)


def _white_a_step_later(array: NDArray[Any]) -> NDArray[Any]:
    """(2, L, ...) by channel to (2, L + 1, ...) by step; 0 where nothing is coded."""
    moved = np.zeros((2, array.shape[1] + 1, *array.shape[2:]), array.dtype)
    moved[BLACK, :-1], moved[WHITE, 1:] = array[BLACK], array[WHITE]
    return moved


class Predictor:
    """Predictor for a batch of images of one grid, in L + 1 steps: call `places` for a step, then `tell` with its bits.

    Args:
        weights: of the tables.
        grid: (height, width).
        num_images: B.

    Attributes:
        spans: by step, which of the N * L bits of an image it codes, in the order of coding: those of black tokens in
            the first, of white ones in the last, of all else.
    """

    def __init__(self, weights: Weights, grid: tuple[int, int], num_images: int) -> None:
        one, steps = board(*grid), weights.num_bits + 1
        black, tokens = one.num_black, len(one.order)
        self._weights, self._num_images = weights, num_images
        self._around = _around(grid, num_images)  # (2, 10, columns)
        columns = num_images * black  # a grid of odd size has a white token less: its last column is idle
        self._plane = np.zeros(2 * columns + 2, np.float32)  # image by image; what lies outside; what is always 1
        self._plane[-1] = 1
        coded = [slice(0, black), *[slice(0, tokens)] * (steps - 2), slice(black, tokens)]  # tokens of a step
        sizes = [some.stop - some.start for some in coded]
        self.spans = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        images = self._plane[: 2 * columns].reshape(num_images, -1)
        self._told = [images[:, some] for some in coded]
        self._asked = [None if size == 2 * black else some for size, some in zip(sizes, coded, strict=True)]
        # what a step works on lies in one piece: NumPy takes several times as long with anything else this small
        self._sums = np.empty((steps + weights.hidden, 2, columns), np.float32)
        self._sums[...] = weights.start.T[:, :, None]
        self._change, self._hidden = np.empty_like(self._sums), self._sums[steps:]
        self._positive, self._zero = np.empty_like(self._hidden), np.zeros_like(self._hidden)
        self._total = np.empty((2, 1, columns), np.float32)
        # views that every step needs, made once
        self._positive_by_colour, self._change_by_colour = self._positive.swapaxes(0, 1), self._change.swapaxes(0, 1)
        self._row = self._total[:, 0]

    def places(self, step: int) -> NDArray[np.intp]:
        """Positions of a step's probabilities in their table, before they are clamped to its ends.

        Returns:
            (B, n), n the bits of the step's span.
        """
        np.maximum(self._hidden, self._zero, out=self._positive)
        np.matmul(self._weights.output[step], self._positive_by_colour, out=self._total)
        row, asked = self._row, self._asked[step]
        np.add(row, self._sums[step], out=row)
        if self._num_images > 1:
            row = row.reshape(2, self._num_images, -1).swapaxes(0, 1)
        places: NDArray[np.intp] = row.astype(np.intp, order="C").reshape(self._num_images, -1)
        return places if asked is None else places[:, asked]

    def tell(self, step: int, bits: NDArray[np.intp]) -> None:
        """Take the bits of a step, (B, n), in the order of `places`."""
        if step == self._weights.num_bits:
            return
        _SIGN.take(bits, out=self._told[step], mode="clip")  # any other mode writes to a copy first
        near, later, change = self._plane[self._around], self._sums[step + 1 :], self._change[step + 1 :]
        np.matmul(self._weights.updates[step], near, out=self._change_by_colour[:, step + 1 :])
        np.add(later, change, out=later)


@lru_cache(maxsize=8)
def _around(grid: tuple[int, int], num_images: int) -> NDArray[np.intp]:
    """Places in the plane of every token's 9 neighbours and of the 1: (2, 10, B * number of black tokens)."""
    one = board(*grid)
    black, tokens = one.num_black, len(one.order)
    size = num_images * 2 * black  # of the plane's images
    around = np.full((num_images, 2 * black, AROUND + 1), size)
    around[:, :tokens, :AROUND] = np.where(
        one.around == tokens, size, one.around + np.arange(num_images)[:, None, None] * 2 * black
    )
    around[..., AROUND] = size + 1
    colours = around.reshape(num_images, 2, black, AROUND + 1).transpose(1, 3, 0, 2)
    found = np.ascontiguousarray(colours.reshape(2, AROUND + 1, -1), np.intp)
    found.setflags(write=False)
    return found
