"""Entropy-coded datasets: where the coder's tables lie, and how rows go through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qlip.archive.layout import Layout
from qlip.archive.schema import DatasetInfo
from qlip.errors import QLIPError


class Coder(Protocol):
    """Packed bits to fewer bytes and back."""

    def decode(self, rows: Sequence[bytes], grids: Sequence[tuple[int, int]]) -> list[bytes]:
        """Packed bits of rows, exactly."""


def open_coder(layout: Layout, info: DatasetInfo) -> Coder:
    """The coder of a dataset.

    Raises:
        QLIPError: it is not there, or its tables are others than the dataset's.
    """
    raise QLIPError(
        f"{layout.address}: its tokens are entropy-coded (tables {(info.table_hash or '')[:12]}), "
        "which this qlip cannot read; pip install -U qlip"
    )
