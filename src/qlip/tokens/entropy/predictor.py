"""Probabilities of the next bits of a batch of images, given the bits that are coded already.

All sums are of integers below 2^24 in size, kept in float32 for fast matrix products: in any order and on any
machine they are exact (`Tables` checks it).

`Weights` lays tables out for matrix products; a `Predictor` keeps the running sums of one batch.

Shapes: B images of N tokens, black ones first (`checkerboard.Checkerboard`), of which M = num_black; L bits per token;
H hidden units; T probabilities in the table.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.tokens.entropy.checkerboard import BLACK, NEIGHBOURHOOD, WHITE, checkerboard
from qlip.tokens.entropy.tables import PROBABILITY_SCALE, Tables

Floats = NDArray[np.float32]
_SIGN = np.array([-1, 1], dtype=np.float32)


class Weights:
    """Tables as matrices for `Predictor`; each weight is an integer over a power of two.

    A token has L + 1 + H running sums: one for each step, then the H hidden ones. White tokens are coded a step later
    than black ones, so their channel c is row c + 1; each step reads one row of both colours. After each plane, one
    matrix product updates the rows of all later steps and the hidden rows. The hidden bias depends on the channel: its
    change from plane to plane is the weight of a tenth neighbour whose value is always 1.

    Attributes:
        updates: for each plane, float32 (2, L - plane + H, 10).
        start: the sums before the first plane, float32 (2, L + 1 + H).
        output: for each step, float32 (2, 1, H).
        pairs: float64 (T, 2), the probabilities of 0 and 1.
    """

    def __init__(self, tables: Tables) -> None:
        bits, hidden = tables.num_bits, tables.hidden_around.shape[3]
        self.num_bits, self.hidden = bits, hidden
        unit = np.float32(2.0 ** -int(tables.shift))
        bias, output = _by_step(tables.bias), _by_step(tables.output)
        hidden_bias = _by_step(tables.hidden_bias.astype(np.int64))  # (2, L + 1, H)
        hidden_bias[WHITE, 0] = hidden_bias[WHITE, 1]  # step 0 codes no white token: no change there
        self.start = np.empty((2, bits + 1 + hidden), np.float32)
        self.start[:, : bits + 1] = bias * unit + np.float32(len(tables.probabilities) // 2)
        self.start[:, bits + 1 :] = hidden_bias[:, 0]
        self.output: list[Floats] = [row[:, None] for row in np.ascontiguousarray((output * unit).swapaxes(0, 1))]
        self.updates: list[Floats] = []
        linear = _by_step(np.ascontiguousarray(tables.linear_around.transpose(0, 3, 1, 2)))  # (2, step, plane, 9)
        for plane in range(bits):
            later = bits - plane  # steps after this one
            rows = np.zeros((2, later + hidden, NEIGHBOURHOOD + 1), np.float32)
            rows[:, :later, :NEIGHBOURHOOD] = linear[:, plane + 1 :, plane] * unit
            rows[:, later:, :NEIGHBOURHOOD] = tables.hidden_around[:, plane].swapaxes(1, 2)
            rows[:, later:, NEIGHBOURHOOD] = hidden_bias[:, plane + 1] - hidden_bias[:, plane]
            if plane + 1 == bits:
                rows[BLACK, later:, NEIGHBOURHOOD] = 0  # all black bits are coded
            self.updates.append(rows)
        ones = tables.probabilities.astype(np.int64)
        self.pairs = np.stack([PROBABILITY_SCALE - ones, ones], axis=1) / PROBABILITY_SCALE  # exact
        self.pairs.setflags(write=False)


def _by_step(array: NDArray[Any]) -> NDArray[Any]:
    """Rearrange (2, L, ...) by channel to (2, L + 1, ...) by step; 0 where a colour has no bit."""
    moved = np.zeros((2, array.shape[1] + 1, *array.shape[2:]), array.dtype)
    moved[BLACK, :-1], moved[WHITE, 1:] = array[BLACK], array[WHITE]
    return moved


class Predictor:
    """Probabilities for a batch of images of one grid, in L + 1 steps: call `predict`, then `update` with the bits.

    Args:
        weights: of the tables.
        grid: (height, width).
        num_images: B.

    Attributes:
        spans: for each step, the slice of an image's N * L bits, in the order of coding, that it codes: bits of black
            tokens in the first step, of white tokens in the last, of all tokens between.
    """

    def __init__(self, weights: Weights, grid: tuple[int, int], num_images: int) -> None:
        order, num_black, _ = checkerboard(*grid)
        black, tokens, steps = num_black, len(order), weights.num_bits + 1
        self._weights, self._num_images = weights, num_images
        self._neighbours = _neighbours(grid, num_images)  # (2, 10, B * M)
        columns = num_images * black  # a grid of odd size has one white token less: its last column is unused
        self._plane = np.zeros(2 * columns + 2, np.float32)  # the images' bits as +1 or -1, then constants 0 and 1
        self._plane[-1] = 1
        coded = [slice(0, black), *[slice(0, tokens)] * (steps - 2), slice(black, tokens)]  # tokens of each step
        sizes = [part.stop - part.start for part in coded]
        self.spans = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        images = self._plane[: 2 * columns].reshape(num_images, -1)  # (B, 2 * M)
        self._inputs = [images[:, part] for part in coded]
        self._selected = [None if size == 2 * black else part for size, part in zip(sizes, coded, strict=True)]
        # contiguous buffers: on arrays this small NumPy is several times slower with anything else
        self._sums = np.empty((steps + weights.hidden, 2, columns), np.float32)
        self._sums[...] = weights.start.T[:, :, None]
        self._change, self._hidden = np.empty_like(self._sums), self._sums[steps:]
        self._positive, self._zero = np.empty_like(self._hidden), np.zeros_like(self._hidden)
        self._total = np.empty((2, 1, columns), np.float32)
        # views that every step uses
        self._positive_by_colour, self._change_by_colour = self._positive.swapaxes(0, 1), self._change.swapaxes(0, 1)
        self._row = self._total[:, 0]

    def predict(self, step: int) -> NDArray[np.intp]:
        """Return the table entry of the probability of each bit of a step, not yet clamped to 0 and T - 1.

        Returns:
            (B, n), n bits in the step's span.
        """
        np.maximum(self._hidden, self._zero, out=self._positive)
        np.matmul(self._weights.output[step], self._positive_by_colour, out=self._total)
        row, selected = self._row, self._selected[step]
        np.add(row, self._sums[step], out=row)
        if self._num_images > 1:
            row = row.reshape(2, self._num_images, -1).swapaxes(0, 1)
        entries: NDArray[np.intp] = row.astype(np.intp, order="C").reshape(self._num_images, -1)
        return entries if selected is None else entries[:, selected]

    def update(self, step: int, bits: NDArray[np.intp]) -> None:
        """Add the bits of a step, (B, n), to the sums."""
        if step == self._weights.num_bits:
            return
        _SIGN.take(bits, out=self._inputs[step], mode="clip")  # any other mode writes to a copy first
        inputs, later, change = self._plane[self._neighbours], self._sums[step + 1 :], self._change[step + 1 :]
        np.matmul(self._weights.updates[step], inputs, out=self._change_by_colour[:, step + 1 :])
        np.add(later, change, out=later)


@lru_cache(maxsize=8)
def _neighbours(grid: tuple[int, int], num_images: int) -> NDArray[np.intp]:
    """Return the index in the plane of each token's 9 neighbours and of the constant 1, (2, 10, B * M)."""
    order, black, neighbours = checkerboard(*grid)
    tokens = len(order)
    size = num_images * 2 * black  # index of the constant 0, for places outside the grid
    indices = np.full((num_images, 2 * black, NEIGHBOURHOOD + 1), size)
    indices[:, :tokens, :NEIGHBOURHOOD] = np.where(
        neighbours == tokens, size, neighbours + np.arange(num_images)[:, None, None] * 2 * black
    )
    indices[..., NEIGHBOURHOOD] = size + 1
    by_colour = indices.reshape(num_images, 2, black, NEIGHBOURHOOD + 1).transpose(1, 3, 0, 2)  # (2, 10, B, M)
    contiguous = np.ascontiguousarray(by_colour.reshape(2, NEIGHBOURHOOD + 1, -1), np.intp)
    contiguous.setflags(write=False)
    return contiguous
