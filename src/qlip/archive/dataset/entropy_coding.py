"""Entropy coding of a dataset's rows, with tables in its folder; a row that does not shrink is stored raw.

A coded row is shorter than the packed bits of its grid; a row of exactly their length is raw.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import DatasetInfo
from qlip.data.storage.retry import MissingError
from qlip.errors import QLIPError
from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.tables import FILE, Tables
from qlip.tokens.packing import packed_size

Grid = tuple[int, int]


class RowCoder:
    """Lossless coder of rows of any grids; safe in threads."""

    def __init__(self, tables: Tables) -> None:
        self.codec = TokenCodec(tables)

    @property
    def table_hash(self) -> str:
        """SHA-256 (hex) of the tables."""
        return self.codec.digest

    def encode(self, rows: Sequence[bytes], grids: Sequence[Grid]) -> list[bytes]:
        """Code rows as a dataset stores them: coded if that is shorter."""
        found = list(rows)
        for grid, places in _by_grid(grids).items():
            if self.codec.can_code(grid[0] * grid[1]):
                coded = self.codec.encode([rows[place] for place in places], grid)
                for place, data in zip(places, coded, strict=True):
                    found[place] = data if len(data) < len(rows[place]) else rows[place]
        return found

    def decode(self, rows: Sequence[bytes], grids: Sequence[Grid]) -> list[bytes]:
        """Decode rows to packed bits.

        Raises:
            QLIPError: bytes that `encode` would not have written.
        """
        found = list(rows)
        for grid, places in _by_grid(grids).items():
            size = packed_size(grid[0] * grid[1], self.codec.num_bits)
            coded = [place for place in places if len(rows[place]) != size]
            if coded:
                decoded = self.codec.decode([rows[place] for place in coded], grid)
                for place, data in zip(coded, decoded, strict=True):
                    found[place] = data
        return found


def open_coder(layout: Layout, info: DatasetInfo) -> RowCoder:
    """Open the coder of a dataset.

    Raises:
        QLIPError: its tables are missing, or are not those that its rows were coded with.
    """
    path = layout.path(FILE)
    try:
        tables = Tables.from_bytes(layout.storage.read(path), path)
    except MissingError:
        raise QLIPError(f"{path}: not there, and the tokens were coded with it; copy the dataset again") from None
    if tables.digest != info.table_hash or tables.num_bits != info.bits_per_token:
        raise QLIPError(
            f"{path}: tables {tables.digest[:12]}, and the tokens were coded with {(info.table_hash or '')[:12]}; "
            "copy the dataset again"
        )
    return RowCoder(tables)


def write_tables(layout: Layout, data: bytes) -> None:
    """Write the content of a file of tables into a dataset's folder."""
    layout.storage.write(layout.path(FILE), data)


def _by_grid(grids: Sequence[Grid]) -> dict[Grid, list[int]]:
    """Return the positions of the rows of each grid."""
    found: dict[Grid, list[int]] = {}
    for place, grid in enumerate(grids):
        found.setdefault(grid, []).append(place)
    return found
