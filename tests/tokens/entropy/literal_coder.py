"""The entropy coder of docs/token-format.md token by token and bit by bit, in Python integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qlip.tokens import Tables

PRECISION = 24
Bits = dict[tuple[int, int, int], int]
"""Bits by (row, column, channel)."""


class LiteralCoder:
    """Slow equivalent of `TokenCodec`, for one image at a time."""

    def __init__(self, tables: Tables) -> None:
        arrays = ("hidden_around", "hidden_bias", "output", "linear_around", "bias", "probabilities")
        self.tables: dict[str, Any] = {name: getattr(tables, name).tolist() for name in arrays}
        self.shift, self.num_bits = int(tables.shift), tables.num_bits

    def encode(self, packed: bytes, grid: tuple[int, int]) -> bytes:
        """Shrink an interval with every bit, then find the shortest string inside it."""
        bits = {
            (row, column, channel): self._packed_bit(packed, (row * grid[1] + column) * self.num_bits + channel)
            for row in range(grid[0])
            for column in range(grid[1])
            for channel in range(self.num_bits)
        }
        low, width, words = 0, 2**64 - 1, 0

        def take(zero: int, place: tuple[int, int, int]) -> int:
            nonlocal low, width, words
            unit = width >> PRECISION
            if bits[place]:
                low, width = low + unit * zero, unit * ((1 << PRECISION) - zero)
            else:
                width = unit * zero
            if width < 1 << 32:
                low, width, words = low << 32, width << 32, words + 1
            return bits[place]

        self._walk(grid, take)
        room = 8 + 4 * words  # bytes of the number
        for length in range(room + 1):
            unit = 256 ** (room - length)
            last = (low + width - 1) // unit
            if last * unit >= low:
                shortest = last.to_bytes(length).rstrip(b"\0")
                return shortest.ljust(-(-len(packed) // 64), b"\0")
        raise AssertionError("an interval without a number")

    def decode(self, coded: bytes, grid: tuple[int, int]) -> bytes:
        """Shrink the same interval; the part that the coded number lies in gives the bit."""
        stream = iter(coded + bytes(16))
        point, width, low = int.from_bytes(next(stream) for _ in range(8)), 2**64 - 1, 0

        def take(zero: int, place: tuple[int, int, int]) -> int:
            nonlocal point, low, width, stream
            unit = width >> PRECISION
            bit = int(point - low >= unit * zero)
            if bit:
                low, width = low + unit * zero, unit * ((1 << PRECISION) - zero)
            else:
                width = unit * zero
            if width < 1 << 32:
                word = int.from_bytes(next(stream, 0) for _ in range(4))
                low, width, point = low << 32, width << 32, point << 32 | word
            return bit

        bits = self._walk(grid, take)
        text = "".join(
            str(bits[row, column, channel])
            for row in range(grid[0])
            for column in range(grid[1])
            for channel in range(self.num_bits)
        )
        size = -(-len(text) // 8)
        return int(text.ljust(8 * size, "0"), 2).to_bytes(size)

    @staticmethod
    def _packed_bit(packed: bytes, position: int) -> int:
        return packed[position // 8] >> (7 - position % 8) & 1

    def _walk(self, grid: tuple[int, int], take: Callable[[int, tuple[int, int, int]], int]) -> Bits:
        """Visit all bits in the order of coding; ``take`` gets the share of 0 in 2^24, and returns the bit."""
        known: Bits = {}
        for step in range(self.num_bits + 1):
            plane = {}
            for place in self._places(grid, step):
                index = len(self.tables["probabilities"]) // 2 + (self._sum(known, grid, step, place) >> self.shift)
                one = self.tables["probabilities"][max(0, min(index, len(self.tables["probabilities"]) - 1))]
                zero = ((65536 - one) * ((1 << PRECISION) - 2) >> 16) + 1
                plane[place] = take(zero, place)
            known |= plane
        return known

    def _places(self, grid: tuple[int, int], step: int) -> Iterator[tuple[int, int, int]]:
        for colour in (0, 1):
            for row in range(grid[0]):
                for column in range(grid[1]):
                    if (row + column) % 2 == colour and 0 <= step - colour < self.num_bits:
                        yield row, column, step - colour

    def _sum(self, known: Bits, grid: tuple[int, int], step: int, place: tuple[int, int, int]) -> int:
        row, column, channel = place
        colour, tables = (row + column) % 2, self.tables
        hidden = list(tables["hidden_bias"][colour][channel])
        total = int(tables["bias"][colour][channel])
        for plane in range(step):
            for around in range(9):
                there = row + around // 3 - 1, column + around % 3 - 1
                bit = known.get((*there, plane - sum(there) % 2))
                if bit is None:  # outside, or not in the plane
                    continue
                sign = 2 * bit - 1
                total += sign * tables["linear_around"][colour][plane][around][channel]
                for unit, weight in enumerate(tables["hidden_around"][colour][plane][around]):
                    hidden[unit] += sign * weight
        for unit, weight in enumerate(tables["output"][colour][channel]):
            total += weight * max(0, hidden[unit])
        return total
