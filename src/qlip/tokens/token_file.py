"""The `.qlip` file: one image's tokens, the fingerprints of the model that made them, and a checksum.

`TokenFile` holds the content, `read_header` reads the header alone, `check_model` refuses tokens of another model.
Version 2 adds the fingerprint of how the image was prepared, and tiles: several grids that form one larger grid.
Version 1 is still read, and still written for tokens whose preparation is unknown.

docs/token-format.md gives the layout byte by byte. Integers are big-endian, as the packed bits are.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError
from qlip.files import write_bytes
from qlip.tokens.entropy.coder import MAX_CODED_TOKENS, TokenCodec
from qlip.tokens.entropy.registry import TAG_BYTES, TokenCodecs
from qlip.tokens.packing import check_packed, pack, packed_size, unpack

MAGIC = b"\xd1LIP"  # "QLIP" with its first bit set: no ASCII or UTF-8 text begins with it
VERSIONS = (1, 2)
RAW_BITS, ENTROPY_CODED = 0, 1  # payload codings

# magic, version, payload coding, flags, bits per token; grid height, width; original width, height;
# payload bytes; code and decoder fingerprint
_HEADER = struct.Struct(">4sBBBBHHIII32s32s")
_EXTENSION = struct.Struct(">8sHH")  # of version 2: preparation fingerprint; rows and columns of tiles
_CHECKSUM = struct.Struct(">I")
HEADER_BYTES = {1: _HEADER.size, 2: _HEADER.size + _EXTENSION.size}  # 88, 100
OVERHEAD_BYTES = {version: size + _CHECKSUM.size for version, size in HEADER_BYTES.items()}  # 92, 104

MAX_PIXELS = 2**28  # of the original image; bounds the size that a file can ask a reader to restore
MAX_GRID_TOKENS = 2**22  # bounds what a file may claim: an image of that size in patches of 8 x 8
MAX_FILE_BYTES = OVERHEAD_BYTES[2] + packed_size(MAX_GRID_TOKENS, 63)

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_PREPARATION = re.compile(r"[0-9a-f]{16}")
_AGAIN = "copy it again, or encode the image again"


@dataclass(frozen=True, slots=True)
class TokenFile:
    """One image's tokens and the data needed to read them; the constructor checks every field.

    Attributes:
        bits: the tokens, packed as `qlip.tokens.packing.pack` does, in raster order of the grid.
        grid: (height, width) in tokens, of all tiles together.
        original_size: (width, height) of the image that was encoded, in pixels.
        bits_per_token: 1 to 63.
        code_fingerprint: SHA-256 (64 lower-case hex digits) of the encoder and its side of the bottleneck.
        decoder_fingerprint: SHA-256 of the decoder and its side of the bottleneck.
        preparation: fingerprint (16 lower-case hex digits) of how the image was prepared, see
            `Preprocessing.fingerprint`; None if that is unknown, as in files of version 1.
        tiles: (rows, columns) of equal tiles that make up the grid; each was encoded by itself.
        source: name of the file in errors; not stored.

    Raises:
        QLIPError: a field is out of range, or the fields do not fit each other.
    """

    bits: bytes = field(repr=False)
    grid: tuple[int, int]
    original_size: tuple[int, int]
    bits_per_token: int
    code_fingerprint: str
    decoder_fingerprint: str
    preparation: str | None = None
    tiles: tuple[int, int] = (1, 1)
    source: str = field(default="these tokens", compare=False)

    def __post_init__(self) -> None:
        try:
            _check_pair("grid (height, width)", self.grid, 2**16 - 1)
            _check_pair("original size (width, height)", self.original_size, 2**32 - 1)
            if self.num_tokens > MAX_GRID_TOKENS:
                raise QLIPError(f"a grid of {self.num_tokens:,} tokens; a file holds at most {MAX_GRID_TOKENS:,}")
            if math.prod(self.original_size) > MAX_PIXELS:
                width, height = self.original_size
                raise QLIPError(f"an original of {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed")
            check_packed(self.bits, self.num_tokens, self.bits_per_token)
            for fingerprint in (self.code_fingerprint, self.decoder_fingerprint):
                if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
                    raise QLIPError(f"a fingerprint is 64 lower-case hex digits, not {str(fingerprint)[:70]!r}")
            self._check_version_2()
        except QLIPError as error:
            raise QLIPError(f"{self.source}: {error}") from None

    def _check_version_2(self) -> None:
        _check_pair("tiles (rows, columns)", self.tiles, 2**16 - 1)
        if any(side % count for side, count in zip(self.grid, self.tiles, strict=True)):
            (rows, columns), (height, width) = self.tiles, self.grid
            raise QLIPError(f"{rows} x {columns} tiles do not divide a grid of {height} x {width} tokens")
        if self.preparation is None:
            if self.tiles != (1, 1):
                raise QLIPError("tiles need a preparation fingerprint; version 1 of the format has neither")
        elif not isinstance(self.preparation, str) or not _PREPARATION.fullmatch(self.preparation):
            raise QLIPError(
                f"a preparation fingerprint is 16 lower-case hex digits, not {str(self.preparation)[:20]!r}"
            )

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        group_size: int,
        *,
        grid: tuple[int, int],
        original_size: tuple[int, int],
        code_fingerprint: str,
        decoder_fingerprint: str,
        preparation: str | None = None,
        tiles: tuple[int, int] = (1, 1),
        source: str = "these tokens",
    ) -> Self:
        """Pack one image's indices, int64 (N, K), N = height * width of `grid`; the other arguments are attributes.

        Indices of tiles, (R * C, n, K), are joined to the grid of all by `join_tiles`.

        Raises:
            QLIPError: the indices do not pack (see `pack`), or a field is out of range.
        """
        return cls(
            bits=pack(indices, group_size),
            grid=grid,
            original_size=original_size,
            bits_per_token=indices.shape[-1] * group_size,
            code_fingerprint=code_fingerprint,
            decoder_fingerprint=decoder_fingerprint,
            preparation=preparation,
            tiles=tiles,
            source=source,
        )

    @property
    def version(self) -> int:
        """Version of the format that the file is written in: 1 without a preparation fingerprint, else 2."""
        return 1 if self.preparation is None else 2

    @property
    def tile_grid(self) -> tuple[int, int]:
        """(height, width) of one tile, in tokens; the whole grid of an image without tiles."""
        return self.grid[0] // self.tiles[0], self.grid[1] // self.tiles[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, height times width of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def num_bytes(self) -> int:
        """Size in bytes of the file with raw bits."""
        return OVERHEAD_BYTES[self.version] + len(self.bits)

    def indices(self, group_size: int) -> Tensor:
        """Unpack the tokens to int64 (N, K), K = bits_per_token / group_size.

        Raises:
            QLIPError: `group_size` does not divide the bits of a token.
        """
        try:
            return unpack(self.bits, self.num_tokens, self.bits_per_token, group_size)
        except QLIPError as error:
            raise QLIPError(f"{self.source}: {error}") from None

    def to_bytes(self, codec: TokenCodec | None = None) -> bytes:
        """Return the content of the file.

        Args:
            codec: entropy coder, used if it makes the file smaller; without it the bits stay raw.
        """
        coding, payload = RAW_BITS, self.bits
        coded = None if codec is None else self._coded(codec)
        if coded is not None and len(coded) < len(payload):
            coding, payload = ENTROPY_CODED, coded
        header = _HEADER.pack(
            MAGIC,
            self.version,
            coding,
            0,
            self.bits_per_token,
            *self.grid,
            *self.original_size,
            len(payload),
            bytes.fromhex(self.code_fingerprint),
            bytes.fromhex(self.decoder_fingerprint),
        )
        if self.preparation is not None:
            header += _EXTENSION.pack(bytes.fromhex(self.preparation), *self.tiles)
        content = header + payload
        return content + _CHECKSUM.pack(zlib.crc32(content))

    def _coded(self, codec: TokenCodec) -> bytes | None:
        """Return the entropy-coded payload; None if the coder is for other tokens."""
        if codec.num_bits != self.bits_per_token or not codec.can_code(self.num_tokens):
            return None
        return bytes.fromhex(codec.digest)[:TAG_BYTES] + codec.encode([self.bits], self.grid)[0]

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "these bytes", codecs: TokenCodecs | None = None) -> Self:
        """Read the whole content of a file.

        Args:
            data: the content; its size, not the header, bounds what is allocated.
            source: name of the file in errors.
            codecs: the model's entropy coders, for files that are entropy-coded.

        Raises:
            QLIPError: wrong magic, newer version, truncated, bytes after the end, damaged, a field out of range, or
                entropy-coded with tables that are not in ``codecs``.
        """
        given: object = data
        if not isinstance(given, bytes | bytearray | memoryview):
            raise QLIPError(f"{source}: the content of a file is bytes, not {type(given).__name__}")
        data = bytes(given)
        header = _checked_header(data, source)
        payload = data[HEADER_BYTES[header.version] : -_CHECKSUM.size]
        if header.coding == ENTROPY_CODED:
            try:
                payload = _decoded(payload, header, codecs)
            except QLIPError as error:
                raise QLIPError(f"{source}: {error}") from None
        return cls(
            bits=payload,
            grid=(header.grid_height, header.grid_width),
            original_size=(header.original_width, header.original_height),
            bits_per_token=header.bits_per_token,
            code_fingerprint=header.code_fingerprint.hex(),
            decoder_fingerprint=header.decoder_fingerprint.hex(),
            preparation=header.preparation.hex() or None,
            tiles=(header.tile_rows, header.tile_columns),
            source=source,
        )

    def save(self, path: str | os.PathLike[str], codec: TokenCodec | None = None) -> None:
        """Write the file atomically, and replace an existing one.

        Missing folders are made; a symbolic link is followed. ``codec`` is as for `to_bytes`.

        Raises:
            QLIPError: it cannot be written (no permission, no space, not a regular file).
        """
        target = Path(_path(path))
        if target.is_symlink():
            target = target.resolve()
        if target.exists() and not target.is_file():  # renaming would replace a device or a pipe with a file
            raise QLIPError(f"{target}: not a regular file; give another path")
        write_bytes(target, self.to_bytes(codec))

    @classmethod
    def load(cls, path: str | os.PathLike[str], codecs: TokenCodecs | None = None) -> Self:
        """Read a file. The size that its header states is compared with the file's before anything else is read.

        ``codecs`` are as for `from_bytes`.

        Raises:
            QLIPError: it cannot be read, or is not a valid `.qlip` file (see `from_bytes`).
        """
        source = _path(path)
        return cls.from_bytes(_read_file(source), source, codecs)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of an undamaged file; the payload is not decoded, so no entropy tables are needed.

    Raises:
        QLIPError: as `TokenFile.load`, except that field values and the payload are not checked.
    """
    source = _path(path)
    return _checked_header(_read_file(source), source)


def check_model(
    token_file: TokenFile,
    model_name: str,
    code_fingerprint: str,
    decoder_fingerprint: str,
    need: Literal["codes", "decoder"] = "codes",
) -> None:
    """Refuse tokens that another model made.

    Args:
        token_file: the tokens.
        model_name: name of the model in the error.
        code_fingerprint: of the model, 64 hex digits.
        decoder_fingerprint: of the model, 64 hex digits.
        need: "codes" to compare or index the tokens with the model's own, "decoder" to reconstruct the image.

    Raises:
        QLIPError: the fingerprint that `need` names differs; the error has the file's and the model's.
    """
    same_codes = token_file.code_fingerprint == code_fingerprint
    same_decoder = token_file.decoder_fingerprint == decoder_fingerprint
    if same_codes if need == "codes" else same_decoder:
        return
    file_model = f"codes {token_file.code_fingerprint[:12]}, decoder {token_file.decoder_fingerprint[:12]}"
    this_model = f"codes {code_fingerprint[:12]}, decoder {decoder_fingerprint[:12]}"
    hint = "; it may be compared with this model's tokens, but not decoded by it" if same_codes else ""
    raise QLIPError(
        f"{token_file.source}: made by another model ({file_model}) than {model_name} ({this_model}){hint}; "
        f"{assets.model_to_give(token_file.code_fingerprint)}"
    )


class Header(NamedTuple):
    """Fields before the payload, as stored in a file."""

    magic: bytes
    version: int
    coding: int
    flags: int
    bits_per_token: int
    grid_height: int
    grid_width: int
    original_width: int
    original_height: int
    payload_bytes: int
    code_fingerprint: bytes
    decoder_fingerprint: bytes
    preparation: bytes = b""
    tile_rows: int = 1
    tile_columns: int = 1


def _path(path: object) -> str:
    if isinstance(path, str | os.PathLike) and isinstance(name := os.fspath(path), str):
        return name
    raise QLIPError(f"{str(path)[:70]!r}: give the path of a .qlip file, not {type(path).__name__}")


def _read_file(source: str) -> bytes:
    """Read a file that is as long as its header states."""
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would hang, reading a device would never end
            raise QLIPError(f"{source}: not a regular file; give a .qlip file")
        with open(source, "rb") as stream:
            header = stream.read(max(HEADER_BYTES.values()))
            _read_header(header, status.st_size, source)
            return header + stream.read(status.st_size - len(header))
    except OSError as error:
        raise QLIPError(f"{source}: cannot be read ({error.strerror}); give the path of a .qlip file") from None


def _checked_header(data: bytes, source: str) -> Header:
    """Parse the header of undamaged content with a known payload coding and flags."""
    header = _read_header(data[: max(HEADER_BYTES.values())], len(data), source)
    if zlib.crc32(data[: -_CHECKSUM.size]) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
        raise QLIPError(f"{source}: damaged, its checksum does not match its content; {_AGAIN}")
    newer = "read it with a newer qlip: pip install -U qlip"
    if header.coding not in (RAW_BITS, ENTROPY_CODED):
        known = f"{RAW_BITS} (raw bits) and {ENTROPY_CODED} (entropy-coded)"
        raise QLIPError(f"{source}: payload coding {header.coding} is unknown, this qlip reads {known}; {newer}")
    if header.flags != 0:
        raise QLIPError(f"{source}: flags 0x{header.flags:02x} are unknown to this qlip; {newer}")
    return header


def _read_header(header: bytes, file_bytes: int, source: str) -> Header:
    """Parse the header and compare the size it states with the file's; no other field is checked."""
    if not header:
        raise QLIPError(f"{source}: empty; {_AGAIN}")
    if not header.startswith(MAGIC) and not MAGIC.startswith(header):
        raise QLIPError(f"{source}: not a .qlip file; give a file that `qlip encode` wrote")
    version = header[len(MAGIC)] if len(header) > len(MAGIC) else VERSIONS[0]
    if version not in VERSIONS:  # a newer version may have another header
        raise QLIPError(
            f"{source}: version {version} of the format, this qlip reads versions 1 and 2; "
            "read it with a newer qlip (pip install -U qlip), or copy it again if it is damaged"
        )
    if len(header) < HEADER_BYTES[version]:
        raise QLIPError(
            f"{source}: truncated ({file_bytes} bytes, the header alone has {HEADER_BYTES[version]}); {_AGAIN}"
        )
    values = _HEADER.unpack(header[: _HEADER.size])
    if version == 2:
        values += _EXTENSION.unpack(header[_HEADER.size : HEADER_BYTES[2]])
    fields = Header(*values)
    stated = OVERHEAD_BYTES[version] + fields.payload_bytes
    if stated > MAX_FILE_BYTES:
        raise QLIPError(
            f"{source}: its header states {stated:,} bytes, more than the largest .qlip file "
            f"({MAX_FILE_BYTES:,}); {_AGAIN}"
        )
    if file_bytes < stated:
        raise QLIPError(
            f"{source}: truncated ({file_bytes:,} of the {stated:,} bytes that its header states); {_AGAIN}"
        )
    if file_bytes > stated:
        raise QLIPError(
            f"{source}: too long ({file_bytes:,} bytes, its header states {stated:,}); "
            "a .qlip file holds one image and nothing after it"
        )
    return fields


def _decoded(payload: bytes, header: Header, codecs: TokenCodecs | None) -> bytes:
    """Decode an entropy-coded payload to raw bits; a payload that the coder would not write for them is refused."""
    height, width, num_bits = header.grid_height, header.grid_width, header.bits_per_token
    if not 1 <= height * width <= MAX_CODED_TOKENS:
        raise QLIPError(f"{height * width:,} entropy-coded tokens; such a file holds 1 to {MAX_CODED_TOKENS:,}")
    tag, coded = payload[:TAG_BYTES], payload[TAG_BYTES:]
    if len(tag) < TAG_BYTES:
        raise QLIPError(f"its entropy-coded payload of {len(payload)} bytes is too short to name its tables; {_AGAIN}")
    if codecs is None:
        raise QLIPError(f"entropy-coded with the tables {tag.hex()}; give the model that coded it")
    codec = codecs.find(tag)
    if codec.num_bits != num_bits:
        raise QLIPError(f"tokens of {num_bits} bits are entropy-coded with tables for {codec.num_bits} bits; {_AGAIN}")
    if len(payload) >= packed_size(height * width, num_bits):
        raise QLIPError(f"entropy-coded to as many bytes as raw bits or more, which no encoder writes; {_AGAIN}")
    return codec.decode([coded], (height, width))[0]


def _check_pair(name: str, pair: tuple[int, int], largest: int) -> None:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(side) is int for side in pair)):
        raise QLIPError(f"the {name} must be a tuple of two integers, not {pair!r}")
    if not all(1 <= side <= largest for side in pair):
        raise QLIPError(f"the {name} must be 1 to {largest:,} each, not {pair}")
