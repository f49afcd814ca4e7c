"""Lossless entropy coding of packed tokens: the tables' probabilities, a range coder, as few bytes as will do.

docs/token-format.md gives the coded bytes exactly. Many images are coded side by side, each to its own bytes, which are
the same as if it were coded alone.

Shapes: B images of N tokens of L bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qlip.errors import QLIPError, require
from qlip.tokens.entropy.checkerboard import coded_order
from qlip.tokens.entropy.predictor import Predictor, Weights
from qlip.tokens.entropy.tables import Tables
from qlip.tokens.packing import check_packed, packed_size

Bits = NDArray[np.intp]
"""(B, N * L), in the order of coding: the bits, or what belongs to each."""

MAX_CODED_TOKENS = 1 << 16
"""Larger grids stay raw bits: about two thousand bytes per token are at work while they are coded."""
SPARSEST = 64
"""Largest factor by which a coded image is shorter than its raw bits; it bounds what a few bytes can allocate."""

_NOT_OURS = "coded bytes that no encoder writes: damaged, or coded with other tables"
_ROWS_AT_ONCE = 1 << 12  # tokens of a batch that are worked on together: what stays in a cache


class TokenCodec:
    """Packs packed tokens further. Threads may share it.

    Args:
        tables: of the model whose tokens they are; those of another model with as many bits per token code without loss
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
        """Load the tables of a file; see `Tables.load`."""
        return cls(Tables.load(path))

    @property
    def num_bits(self) -> int:
        """Bits per token (L)."""
        return self.tables.num_bits

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tables, without which nothing that they coded can be read."""
        return self.tables.digest

    def can_code(self, num_tokens: int) -> bool:
        """True for images of a size that is coded at all."""
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
            bits = self._unpack(images[start:stop], grid)
            places, predictor = np.empty_like(bits), Predictor(self._weights, grid, stop - start)
            for step, some in enumerate(predictor.spans):
                places[:, some] = predictor.places(step)
                predictor.tell(step, bits[:, some])
            coded += self._seal_all(bits, places, tokens)
        return coded

    def decode(self, streams: Sequence[bytes], grid: tuple[int, int]) -> list[bytes]:
        """Decode to the packed tokens that `encode` was given.

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
                raise QLIPError(
                    f"{len(stream):,} coded bytes are too few for {tokens:,} tokens of {self.num_bits} bits"
                )
        images: list[bytes] = []
        for start, stop in _parts(len(streams), tokens):
            part = streams[start:stop]
            bits, places = self._decode_part(part, grid)
            for stream, again in zip(part, self._seal_all(bits, places, tokens), strict=True):
                if stream != again:
                    raise QLIPError(_NOT_OURS)
            images += self._pack(bits, grid)
        return images

    def _decode_part(self, streams: Sequence[bytes], grid: tuple[int, int]) -> tuple[Bits, Bits]:
        """The bits, and the places of their probabilities."""
        decoders = [self._decoder(_words(stream)) for stream in streams]
        predictor = Predictor(self._weights, grid, len(streams))
        bits = np.empty((len(streams), self.num_bits * grid[0] * grid[1]), np.intp)
        places, take, bit = np.empty_like(bits), self._weights.pairs.take, self._bit
        for step, some in enumerate(predictor.spans):
            found = bits[:, some]
            if not found.size:  # a single token is black
                continue
            places[:, some] = now = predictor.places(step)
            pairs = take(now, axis=0, mode="clip")
            try:
                for n, decoder in enumerate(decoders):
                    found[n] = decoder.decode(bit, pairs[n])
            except AssertionError:  # constriction's word for a number outside all intervals
                raise QLIPError(_NOT_OURS) from None
            predictor.tell(step, found)
        return bits, places

    def _seal_all(self, bits: Bits, places: Bits, tokens: int) -> Iterator[bytes]:
        """The coded bytes of each image, from its bits and the places of their probabilities."""
        shortest = -(-packed_size(tokens, self.num_bits) // SPARSEST)
        for its_bits, its_places in zip(bits.astype(np.int32), places, strict=True):
            pairs = self._weights.pairs.take(its_places, axis=0, mode="clip")
            encoder = self._encoder()
            encoder.encode(its_bits, self._bit, pairs)
            yield _seal(encoder).ljust(shortest, b"\0")

    def _check_grid(self, grid: tuple[int, int]) -> int:
        tokens = grid[0] * grid[1]
        if min(grid) < 1 or not self.can_code(tokens):
            raise QLIPError(
                f"a grid of {grid[0]} x {grid[1]} tokens; entropy coding takes 1 to {MAX_CODED_TOKENS:,} of them"
            )
        return tokens

    def _unpack(self, images: Sequence[bytes], grid: tuple[int, int]) -> Bits:
        packed = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), -1)
        order = coded_order(*grid, self.num_bits)
        return np.unpackbits(packed, axis=1, count=len(order)).take(order, axis=1).astype(np.intp)

    def _pack(self, bits: Bits, grid: tuple[int, int]) -> list[bytes]:
        raster = np.empty(bits.shape, np.uint8)
        raster[:, coded_order(*grid, self.num_bits)] = bits
        return [row.tobytes() for row in np.packbits(raster, axis=1)]


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
    """Shortest string of bytes inside the encoder's last interval, zeros implied after it; the largest of several.

    The library itself stops at a whole word of 4 bytes.
    """
    words: NDArray[np.uint32] = encoder.get_compressed()
    position: int
    low: int
    width: int
    position, (low, width) = encoder.pos()  # the interval, its last 64 bits after `position` words
    inside = int.from_bytes(words.astype(">u4").tobytes()) << 32 * (position + 2 - len(words))
    low = inside - (inside - low) % (1 << 64)
    top = low + width - 1
    free = ((low - 1) ^ top).bit_length() - 1 if low else 64 + 32 * position
    whole = free // 8
    size = 4 * (position + 2)
    return (top >> 8 * whole << 8 * whole).to_bytes(size)[: size - whole].rstrip(b"\0")
