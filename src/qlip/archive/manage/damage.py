"""Where a part is damaged: the bit, the column, the row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlip.archive.dataset.layout import Entry
from qlip.archive.dataset.parquet_reader import open_bytes
from qlip.archive.manage import flips
from qlip.errors import require

FOOTER_TAIL = 8  # Parquet: the footer's length and "PAR1"


@dataclass(frozen=True)
class Damage:
    """What is wrong with a part whose checksum does not fit.

    Attributes:
        what: in words, one line.
        byte, bit: where a single bit is flipped; bit 0 is worth 1.
        column: of the rows, where the damage lies in a column.
        rows: of the part, that read otherwise or not at all; first and last.
        key: of the first of them, where it can be read.
        mended: the right bytes, where a single bit is flipped and turning it gives the part's SHA-256.
    """

    what: str
    byte: int | None = None
    bit: int | None = None
    column: str | None = None
    rows: tuple[int, int] | None = None
    key: str | None = None
    mended: bytes | None = None


def find_damage(data: bytes, entry: Entry) -> Damage | None:
    """What is wrong with a part's bytes; None where they are those that were written."""
    if entry.describes(data):
        return None
    if len(data) != entry.bytes:
        short, what = entry.bytes - len(data), "bytes are missing" if len(data) < entry.bytes else "bytes too many"
        return Damage(f"{abs(short):,} {what}: {len(data):,} of {entry.bytes:,}")
    for byte, bit in flips.candidates(data, entry.crc32):
        mended = flips.flipped(data, byte, bit)
        if entry.describes(mended):
            return _one_bit(data, mended, byte, bit)
    return _many_bits(data)


def _one_bit(damaged: bytes, mended: bytes, byte: int, bit: int) -> Damage:
    what = f"one bit is flipped: byte {byte:,}, bit {bit}"
    for chunk in _chunks(mended):
        if not chunk.begin <= byte < chunk.end:
            continue
        rows = _rows_that_differ(damaged, mended, chunk)
        key = _key(mended, rows[0])
        words = f"row {rows[0]:,}" if rows[0] == rows[1] else f"rows {rows[0]:,} to {rows[1]:,}"
        return Damage(
            f"{what}, in column {chunk.column!r}, {words} (key {key!r}{', the first' if rows[0] < rows[1] else ''})",
            byte,
            bit,
            chunk.column,
            rows,
            key,
            mended,
        )
    footer = len(mended) - FOOTER_TAIL - int.from_bytes(mended[-FOOTER_TAIL:-4], "little")
    where = "footer, which describes the columns" if byte >= footer else "file's first bytes"
    return Damage(f"{what}, in the {where}; no row is touched", byte, bit, mended=mended)


def _many_bits(damaged: bytes) -> Damage:
    """More than one bit: the pages whose own checksums do not fit."""
    arrow = require("pyarrow", extra="tables")
    several = "more than one bit is damaged"
    try:
        chunks = list(_chunks(damaged))
    except (OSError, arrow.ArrowException):
        return Damage(f"{several}, in the footer too, so no row can be read")
    broken = [chunk for chunk in chunks if _column(damaged, chunk, check=True) is None]
    if not broken:
        return Damage(f"{several}, in the footer or between the columns")
    first = broken[0]
    rows = (first.first_row, first.first_row + first.rows - 1)
    columns = ", ".join(dict.fromkeys(chunk.column for chunk in broken))
    last = max(chunk.first_row + chunk.rows - 1 for chunk in broken)
    where = f"rows {min(chunk.first_row for chunk in broken):,} to {last:,}"
    return Damage(f"{several}, in columns {columns}, {where}", column=first.column, rows=rows)


@dataclass(frozen=True)
class _Chunk:
    """A column of a row group, as it lies in the file."""

    column: str
    group: int
    begin: int
    end: int
    first_row: int
    rows: int


def _chunks(data: bytes) -> Iterator[_Chunk]:
    file = open_bytes(data, check=False)
    first_row = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            offsets = (column.dictionary_page_offset, column.data_page_offset)
            begin = min(offset for offset in offsets if offset)  # none is 0: the file begins with "PAR1"
            end = begin + column.total_compressed_size
            yield _Chunk(column.path_in_schema.split(".")[0], number, begin, end, first_row, group.num_rows)
        first_row += group.num_rows


def _rows_that_differ(damaged: bytes, mended: bytes, chunk: _Chunk) -> tuple[int, int]:
    """First and last row that read otherwise; all of the row group where it cannot be read."""
    right, wrong = _column(mended, chunk, check=False), _column(damaged, chunk, check=False)
    if right is None or wrong is None or len(wrong) != len(right):
        return chunk.first_row, chunk.first_row + chunk.rows - 1
    differ = [row for row, (one, other) in enumerate(zip(right, wrong, strict=True)) if one != other]
    if not differ:  # the page's header, or bytes that nobody reads: the page's checksum fails for all its rows
        return chunk.first_row, chunk.first_row + chunk.rows - 1
    return chunk.first_row + differ[0], chunk.first_row + differ[-1]


def _column(data: bytes, chunk: _Chunk, check: bool) -> list[Any] | None:
    """The column's values as bytes or text, so that a number that is none equals itself; None: it cannot be read."""
    arrow = require("pyarrow", extra="tables")
    try:
        column = open_bytes(data, check).read_row_group(chunk.group, columns=[chunk.column]).column(0)
        return [repr(value) for value in column.to_pylist()]
    except (OSError, arrow.ArrowException, UnicodeDecodeError):
        return None


def _key(data: bytes, row: int) -> str:
    return str(open_bytes(data, check=False).read(columns=["key"]).column(0)[row].as_py())
