"""Lossless entropy coding of packed tokens: the tables' probabilities, a range coder, as few bytes as will do.

docs/token-format.md gives the coded bytes exactly. Many images are coded side by side, each to its own bytes, which are
the same as if it were coded alone.

Shapes: B images of N tokens of L bits; rows as in `qlip.tokens.predictor`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qlip.errors import QLIPError, require
from qlip.tokens.contexts import BLACK, WHITE, board
from qlip.tokens.packing import check_packed, packed_size
from qlip.tokens.predictor import Predictor, Weights
from qlip.tokens.tables import Tables

MAX_CODED_TOKENS = 1 << 16
"""Larger grids stay raw bits: a few hundred bytes a token are at work while they are coded."""
SPARSEST = 64
"""A coded image is never shorter than its raw bits by more than this factor: nobody allocates much for a few bytes."""

_ROWS_AT_ONCE = 1 << 13  # tokens of a batch that are worked on together: what stays in a cache


class TokenCodec:
    """Packs packed tokens further. Threads may share it.

    Args:
        tables: of the model whose tokens they are; those of another model with as many bits a token code without loss
            too, only worse.

    Raises:
        QLIPError: the package ``constriction`` is not installed.
    """

    def __init__(self, tables: Tables) -> None:
        stream: Any = require("constriction", extra="tokens").stream
        self.tables, self._weights = tables, Weights(tables)
        self._encoder, self._decoder = stream.queue.RangeEncoder, stream.queue.RangeDecoder
        self._bit = stream.model.Categorical(perfect=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """With the tables of a file; see `Tables.load`."""
        return cls(Tables.load(path))

    @property
    def num_bits(self) -> int:
        """Bits a token (L)."""
        return self.tables.num_bits

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tables, without which nothing that they coded can be read."""
        return self.tables.digest

    def can_code(self, num_tokens: int) -> bool:
        """Whether images of so many tokens are coded at all."""
        return 1 <= num_tokens <= MAX_CODED_TOKENS

    def encode(self, images: Sequence[bytes], grid: tuple[int, int]) -> list[bytes]:
        """Code images of one grid.

        Args:
            images: packed tokens of `num_bits` each, as `qlip.tokens.pack` makes them.
            grid: (height, width).

        Returns:
            The coded bytes of each. They may be more than the packed ones where the tokens are unlike those that the
            tables were trained on: keep the shorter.

        Raises:
            QLIPError: bytes that are no packed tokens of this grid, or more than `MAX_CODED_TOKENS` of them.
        """
        tokens = self._check_grid(grid)
        for image in images:
            check_packed(image, tokens, self.num_bits)
        coded: list[bytes] = []
        for start, stop in _parts(len(images), tokens):
            bits = self._unpack(images[start:stop], grid)  # (L, rows)
            predictor = Predictor(self._weights, grid, stop - start)
            places = np.empty(bits.shape, np.intp)
            for channel, phase in self._steps(tokens):
                rows = predictor.rows[phase]
                places[channel, rows] = predictor.places(channel, phase)
                predictor.tell(channel, phase, bits[channel, rows])
            coded += self._seal_all(bits, places, grid, stop - start)
        return coded

    def decode(self, streams: Sequence[bytes], grid: tuple[int, int]) -> list[bytes]:
        """The packed tokens that `encode` was given.

        Args:
            streams: what `encode` returned, each exactly.
            grid: (height, width).

        Raises:
            QLIPError: bytes that `encode` would not have written for any image: damaged, cut, with something after
                their end, or coded with other tables.
        """
        tokens = self._check_grid(grid)
        size = packed_size(tokens, self.num_bits)
        for stream in streams:
            if len(stream) * SPARSEST < size:
                raise QLIPError(f"{len(stream):,} coded bytes are too few for {tokens:,} tokens of {self.num_bits} bits")
        images: list[bytes] = []
        for start, stop in _parts(len(streams), tokens):
            part = streams[start:stop]
            bits, places = self._decode_part(part, grid)
            for stream, again in zip(part, self._seal_all(bits, places, grid, stop - start), strict=True):
                if stream != again:
                    raise QLIPError("coded bytes that no encoder writes: damaged, or coded with other tables")
            images += self._pack(bits, grid, stop - start)
        return images

    def _decode_part(self, streams: Sequence[bytes], grid: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
        tokens, count = grid[0] * grid[1], len(streams)
        decoders = [self._decoder(_words(stream)) for stream in streams]
        predictor = Predictor(self._weights, grid, count)
        bits = np.empty((self.num_bits, count * tokens), np.int32)
        places = np.empty(bits.shape, np.intp)
        for channel, phase in self._steps(tokens):
            rows = predictor.rows[phase]
            places[channel, rows] = now = predictor.places(channel, phase)
            pairs = self._weights.pairs.take(now, axis=0, mode="clip")
            found, each = bits[channel, rows], len(now) // count
            try:
                for n, decoder in enumerate(decoders):
                    some = slice(n * each, (n + 1) * each)
                    found[some] = decoder.decode(self._bit, pairs[some])
            except AssertionError:  # constriction's word for a number outside all intervals
                raise QLIPError("coded bytes that no encoder writes: damaged, or coded with other tables") from None
            predictor.tell(channel, phase, found)
        return bits, places

    def _seal_all(
        self, bits: NDArray[np.int32], places: NDArray[np.intp], grid: tuple[int, int], count: int
    ) -> Iterator[bytes]:
        """The coded bytes of each image, from all bits and the places of their probabilities, (L, rows) both."""
        black, size = board(*grid).num_black, packed_size(grid[0] * grid[1], self.num_bits)
        white = grid[0] * grid[1] - black
        for n in range(count):
            rows = [slice(n * black, (n + 1) * black), slice(count * black + n * white, count * black + (n + 1) * white)]
            one, where = (np.concatenate([array[:, some] for some in rows], axis=1).ravel() for array in (bits, places))
            encoder = self._encoder()
            encoder.encode(one, self._bit, self._weights.pairs.take(where, axis=0, mode="clip"))
            yield _seal(encoder).ljust(-(-size // SPARSEST), b"\0")

    def _steps(self, tokens: int) -> list[tuple[int, int]]:
        phases = (BLACK, WHITE) if tokens > 1 else (BLACK,)
        return [(channel, phase) for channel in range(self.num_bits) for phase in phases]

    def _check_grid(self, grid: tuple[int, int]) -> int:
        tokens = grid[0] * grid[1]
        if min(grid) < 1 or not self.can_code(tokens):
            raise QLIPError(
                f"a grid of {grid[0]} x {grid[1]} tokens; entropy coding takes 1 to {MAX_CODED_TOKENS:,} of them"
            )
        return tokens

    def _unpack(self, images: Sequence[bytes], grid: tuple[int, int]) -> NDArray[np.int32]:
        """Bits (L, rows)."""
        one, tokens = board(*grid), grid[0] * grid[1]
        packed = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), -1)
        flat = np.unpackbits(packed, axis=1, count=tokens * self.num_bits)
        bits = flat.reshape(len(images), tokens, self.num_bits)[:, one.order]
        colours = (bits[:, : one.num_black], bits[:, one.num_black :])
        rows = np.concatenate([colour.reshape(-1, self.num_bits) for colour in colours])
        return np.ascontiguousarray(rows.T, np.int32)

    def _pack(self, bits: NDArray[np.int32], grid: tuple[int, int], count: int) -> list[bytes]:
        one = board(*grid)
        rows, border = bits.T.astype(np.uint8), count * one.num_black
        placed = np.empty((count, grid[0] * grid[1], self.num_bits), np.uint8)
        placed[:, one.order[: one.num_black]] = rows[:border].reshape(count, -1, self.num_bits)
        placed[:, one.order[one.num_black :]] = rows[border:].reshape(count, -1, self.num_bits)
        return [row.tobytes() for row in np.packbits(placed.reshape(count, -1), axis=1)]


def _parts(count: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Borders of the pieces that a batch is worked on in."""
    each = max(1, _ROWS_AT_ONCE // tokens)
    for start in range(0, count, each):
        yield start, min(start + each, count)


def _words(stream: bytes) -> NDArray[np.uint32]:
    """The big-endian words that the range decoder reads, zeros after the end."""
    padded = stream.ljust(-(-len(stream) // 4) * 4 + 8, b"\0")
    return np.frombuffer(padded, ">u4").astype(np.uint32)


def _seal(encoder: Any) -> bytes:
    """The fewest bytes that name the encoder's last interval, with zeros thought after them; the largest of these.

    The library itself stops at a whole word of 4 bytes.
    """
    words = encoder.get_compressed()
    position, (low, width) = encoder.pos()  # the interval, its last 64 bits after `position` words
    inside = int.from_bytes(words.astype(">u4").tobytes()) << 32 * (position + 2 - len(words))
    low = inside - (inside - low) % (1 << 64)
    top = low + width - 1
    free = ((low - 1) ^ top).bit_length() - 1 if low else 64 + 32 * position
    whole = free // 8
    return (top >> 8 * whole << 8 * whole).to_bytes(4 * (position + 2))[: 4 * (position + 2) - whole].rstrip(b"\0")
