"""What stands under a dataset's pictures on a sheet, and how many stand side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlip.archive.dataset import Row

TITLE, NAME = 20, 24
"""Letters under a picture, at most."""


def across(count: int) -> int:
    """Pictures side by side: a sheet somewhat wider than high, its last row as full as may be."""

    def fault(across: int) -> float:
        rows = -(-count // across)
        return 3 * (rows * across - count) / count + abs(math.log(across / rows / 1.2))

    return min(range(1, count + 1), key=fault)


def title(row: Row) -> str:
    """What the dataset says in words of a picture, as much as fits."""
    said = row.label or (row.captions[0] if row.captions else "")
    return said if len(said) <= TITLE else said[: TITLE - 3].rstrip() + "..."


def tail(key: str) -> str:
    """The end of a key, as much as fits."""
    return key if len(key) <= NAME else "..." + key[3 - NAME :]
