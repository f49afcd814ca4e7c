"""Lossless entropy coding of packed tokens: probabilities from tables, a range coder, no superfluous bytes at the end.

docs/token-format.md gives the coded bytes exactly. A batch of images is coded at once, each image to its own bytes;
these do not depend on the batch.

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
"""(B, N * L) in the order of coding: bits, or one value for each bit."""

MAX_CODED_TOKENS = 1 << 16
"""Larger grids stay raw bits: coding takes about 2,000 bytes of memory per token."""
MAX_RATIO = 64
"""Largest factor by which a coded image is shorter than its raw bits; it bounds what a few bytes can allocate."""

_INVALID = "coded bytes that no encoder writes: damaged, or coded with other tables"
_TOKENS_PER_CHUNK = 1 << 12  # larger working sets do not stay in the processor's cache


class TokenCodec:
    """Entropy coder of packed tokens. Threads may share it.

    Args:
        tables: of the model that made the tokens. Tables of another model with as many bits per token are lossless
            too, but save less.

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
        """SHA-256 (hex) of the tables, which names them in files."""
        return self.tables.digest

    def can_code(self, num_tokens: int) -> bool:
        """Return whether images of this many tokens can be coded."""
        return 1 <= num_tokens <= MAX_CODED_TOKENS

    def encode(self, images: Sequence[bytes], grid: tuple[int, int]) -> list[bytes]:
        """Code images of one grid.

        Args:
            images: packed tokens of `num_bits` each, as `qlip.tokens.pack` makes them.
            grid: (height, width).

        Returns:
            The coded bytes of each image. For tokens unlike those that the tables were trained on they may be longer
            than the packed ones; keep the shorter.

        Raises:
            QLIPError: bytes that are not packed tokens of this grid, or a grid of more than `MAX_CODED_TOKENS`.
        """
        tokens = self._check_grid(grid)
        for image in images:
            check_packed(image, tokens, self.num_bits)
        coded: list[bytes] = []
        for start, stop in _chunks(len(images), tokens):
            bits = self._unpack(images[start:stop], grid)
            entries, predictor = np.empty_like(bits), Predictor(self._weights, grid, stop - start)
            for step, span in enumerate(predictor.spans):
                entries[:, span] = predictor.predict(step)
                predictor.update(step, bits[:, span])
            coded += self._encode_bits(bits, entries, tokens)
        return coded

    def decode(self, streams: Sequence[bytes], grid: tuple[int, int]) -> list[bytes]:
        """Decode what `encode` returned to packed tokens.

        Args:
            streams: the coded bytes of each image, exactly.
            grid: (height, width).

        Raises:
            QLIPError: bytes that `encode` writes for no image: damaged, truncated, followed by other bytes, or coded
                with other tables.
        """
        tokens = self._check_grid(grid)
        size = packed_size(tokens, self.num_bits)
        for stream in streams:
            if len(stream) * MAX_RATIO < size:
                raise QLIPError(
                    f"{len(stream):,} coded bytes are too few for {tokens:,} tokens of {self.num_bits} bits"
                )
        images: list[bytes] = []
        for start, stop in _chunks(len(streams), tokens):
            chunk = streams[start:stop]
            bits, entries = self._decode_bits(chunk, grid)
            for stream, encoded in zip(chunk, self._encode_bits(bits, entries, tokens), strict=True):
                if stream != encoded:
                    raise QLIPError(_INVALID)
            images += self._pack(bits, grid)
        return images

    def _decode_bits(self, streams: Sequence[bytes], grid: tuple[int, int]) -> tuple[Bits, Bits]:
        """Return the bits and the table entries of their probabilities."""
        decoders = [self._decoder(_words(stream)) for stream in streams]
        predictor = Predictor(self._weights, grid, len(streams))
        bits = np.empty((len(streams), self.num_bits * grid[0] * grid[1]), np.intp)
        entries, take, bit = np.empty_like(bits), self._weights.pairs.take, self._bit
        for step, span in enumerate(predictor.spans):
            decoded = bits[:, span]  # a view
            if not decoded.size:  # a grid of a single token has no white one
                continue
            entries[:, span] = current = predictor.predict(step)
            pairs = take(current, axis=0, mode="clip")  # (B, n, 2)
            try:
                for n, decoder in enumerate(decoders):
                    decoded[n] = decoder.decode(bit, pairs[n])
            except AssertionError:  # raised by constriction for a number outside all intervals
                raise QLIPError(_INVALID) from None
            predictor.update(step, decoded)
        return bits, entries

    def _encode_bits(self, bits: Bits, entries: Bits, tokens: int) -> Iterator[bytes]:
        """Iterate over the coded bytes of each image, from its bits and the table entries of their probabilities."""
        shortest = -(-packed_size(tokens, self.num_bits) // MAX_RATIO)
        for image_bits, image_entries in zip(bits.astype(np.int32), entries, strict=True):
            pairs = self._weights.pairs.take(image_entries, axis=0, mode="clip")
            encoder = self._encoder()
            encoder.encode(image_bits, self._bit, pairs)
            yield _finish(encoder).ljust(shortest, b"\0")

    def _check_grid(self, grid: tuple[int, int]) -> int:
        tokens = grid[0] * grid[1]
        if min(grid) < 1 or not self.can_code(tokens):
            raise QLIPError(
                f"a grid of {grid[0]} x {grid[1]} tokens; entropy coding takes 1 to {MAX_CODED_TOKENS:,} tokens"
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


def _chunks(count: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Iterate over the borders [start, stop) of a batch's chunks, which are coded one after the other."""
    size = max(1, _TOKENS_PER_CHUNK // tokens)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _words(stream: bytes) -> NDArray[np.uint32]:
    """Convert to the 32-bit words that the range decoder reads, with zeros after the end."""
    padded = stream.ljust(-(-len(stream) // 4) * 4 + 8, b"\0")
    return np.frombuffer(padded, ">u4").astype(np.uint32)


def _finish(encoder: Any) -> bytes:
    """Return the shortest string of bytes in the encoder's last interval, zeros implied after it; the largest of these.

    The library's own result is a multiple of 4 bytes.
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
