"""A dataset's images on a sheet: what stands above and under them, and how many stand side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from qlip.archive.dataset.dataset import Row

TITLE, NAME = 20, 24
"""Letters under an image, at most."""
MANY, SMALL = 48, 128
"""So many images are shown large; of more each is enlarged to so many pixels."""


@dataclass(frozen=True)
class Shown:
    """An image of a dataset on a sheet.

    Attributes:
        row: that it was rebuilt from.
        image: RGB.
        before, under: what stands before its words, and before its key under it.
    """

    row: Row
    image: Image.Image
    before: str = ""
    under: str = ""


def write(
    file: Path,
    shown: Sequence[Shown],
    heading: str,
    whole: str,
    maker: str | None = None,
    beside: Image.Image | None = None,
) -> None:
    """Write images side by side, each with its words and its key, below what they are.

    Args:
        file: whose ending names the format.
        shown: may be none; then only what they would be is drawn.
        heading: of the sheet.
        whole: what they are of, in small letters.
        maker: name of the model that rebuilt them.
        beside: an image to the heading's left.
    """
    from qlip.cli import outputs
    from qlip.cli.image import contact_sheet as pictures
    from qlip.files import write_bytes

    by = "" if maker is None else f" by {maker}"
    detail = f"{whole}, rebuilt from {_token_bytes(shown)} bytes of tokens each{by}"
    sheets = [pictures.heading(heading, detail, beside)]
    if shown:
        exhibits = [
            pictures.Exhibit(one.before + title(one.row), (("", one.image),), one.under + tail(one.row.key))
            for one in shown
        ]
        small = pictures.SMALL if len(exhibits) <= MANY else SMALL
        sheets.append(pictures.draw(exhibits, across(len(exhibits)), small))
    write_bytes(file, outputs.picture_file(file, pictures.stack(sheets)))


def _token_bytes(shown: Sequence[Shown]) -> str:
    sizes = sorted({len(one.row.tokens) for one in shown})
    return "few" if not sizes else f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def across(count: int) -> int:
    """Images side by side: a sheet somewhat wider than high, its last row as full as may be."""

    def fault(across: int) -> float:
        rows = -(-count // across)
        return 3 * (rows * across - count) / count + abs(math.log(across / rows / 1.2))

    return min(range(1, count + 1), key=fault)


def title(row: Row) -> str:
    """What the dataset says in words of an image, as much as fits."""
    said = row.label or (row.captions[0] if row.captions else "")
    return said if len(said) <= TITLE else said[: TITLE - 3].rstrip() + "..."


def tail(key: str) -> str:
    """The end of a key, as much as fits."""
    return key if len(key) <= NAME else "..." + key[3 - NAME :]
