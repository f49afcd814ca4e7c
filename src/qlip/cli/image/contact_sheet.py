"""Contact sheets: images side by side in one image, each with a title and a line below it.

An `Exhibit` is one image on a sheet, with further panels such as its reconstruction. `draw` lays exhibits out in a
grid, `heading` makes a strip to stand above it, `stack` joins strips and grids. `write_rows` makes the sheet of
reconstructed dataset rows, each a `SheetImage`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from qlip.cli.outputs import image_file
from qlip.files import write_bytes

if TYPE_CHECKING:
    from qlip.archive.dataset.dataset import Row

GAIN = 4
"""Factor that makes a difference of images visible."""

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 30), (112, 117, 125)
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)
Colour = tuple[int, int, int]
GAP, MARGIN = 6, 24
TITLE, CAPTION, LARGE_TITLE = 19, 16, 28
BESIDE, WIDEST, LONGEST = 96, 8, 80  # an image in a heading: pixels high, width / height; characters of a heading
SHAPE = 1.4  # width over height of a sheet
FEW, LARGE, SMALL = 2, 384, 192  # up to FEW exhibits are enlarged to LARGE pixels, more to SMALL
MANY, TINY = 48, 128  # images of a dataset: more than MANY are enlarged to TINY pixels
CAPTION_LENGTH, KEY_LENGTH = 20, 24  # characters above and below an image of a dataset


@dataclass(frozen=True)
class Exhibit:
    """One image on a sheet.

    Attributes:
        title: line above it.
        panels: (heading, RGB image) pairs, side by side; the first heading is empty, the title stands there.
        caption: line below it.
        lines: further lines below it, with their colours; as many for each image of a sheet.
    """

    title: str
    panels: tuple[tuple[str, Image.Image], ...]
    caption: str
    lines: tuple[tuple[str, Colour], ...] = ()


def comparison(original: Image.Image, rebuilt: Image.Image, title: str, caption: str) -> Exhibit:
    """Return original, reconstruction and their difference times ``GAIN``; both are RGB and of equal size."""
    difference = ImageChops.difference(original, rebuilt).point(lambda value: min(255, GAIN * value))
    panels = (("", original), ("from its tokens", rebuilt), (f"difference x {GAIN}", difference))
    return Exhibit(title, panels, caption)


def draw(exhibits: Sequence[Exhibit], columns: int | None = None, small: int = SMALL) -> Image.Image:
    """Lay out exhibits in a grid; small panels are enlarged by integer factors, so that pixels stay squares.

    Args:
        exhibits: at least one, all with the same number of panels.
        columns: number of columns; by default one that makes a full sheet of about ``SHAPE``.
        small: longer side in pixels that the panels of more than ``FEW`` exhibits are enlarged to.
    """
    panels = _enlarged(exhibits, small)
    cell = (
        max(_text_width(exhibits), *(panel.width for row in panels for panel in row)),
        max(panel.height for row in panels for panel in row),
    )
    across = len(panels[0]) * (cell[0] + GAP) - GAP
    lines = max(len(exhibit.lines) for exhibit in exhibits)
    step = (across + 2 * MARGIN, TITLE + 10 + cell[1] + 8 + (CAPTION + 8) * (1 + lines) + MARGIN)
    columns = columns or _columns(len(exhibits), step)
    sheet = Image.new("RGB", (columns * step[0], math.ceil(len(exhibits) / columns) * step[1] + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (exhibit, row) in enumerate(zip(exhibits, panels, strict=True)):
        left, top = MARGIN + i % columns * step[0], MARGIN + i // columns * step[1]
        pen.text((left, top), _shortened(exhibit.title, cell[0], TITLE), INK, _font(TITLE))
        for k, ((heading, _), panel) in enumerate(zip(exhibit.panels, row, strict=True)):
            x = left + k * (cell[0] + GAP)
            pen.text((x, top + TITLE - CAPTION), heading, FAINT, _font(CAPTION))
            sheet.paste(panel, (x, top + TITLE + 10))
        below = top + TITLE + 10 + max(panel.height for panel in row) + 8
        for text, colour in ((exhibit.caption, FAINT), *exhibit.lines):
            pen.text((left, below), _shortened(text, across, CAPTION), colour, _font(CAPTION))
            below += CAPTION + 8
    return sheet


def heading(text: str, detail: str, beside: Image.Image | None = None) -> Image.Image:
    """Return a strip with the description of a sheet.

    Args:
        text: large line.
        detail: small line below it.
        beside: image to their left, shown ``BESIDE`` pixels high; of a very wide one, the centre.
    """
    left, height = MARGIN, MARGIN + LARGE_TITLE + 8 + CAPTION + 8
    if beside is not None:
        if beside.width > WIDEST * beside.height:
            beside = ImageOps.fit(beside, (WIDEST * BESIDE, BESIDE))
        beside = beside.resize((max(1, round(beside.width * BESIDE / beside.height)), BESIDE), Image.Resampling.LANCZOS)
        left, height = 2 * MARGIN + beside.width, MARGIN + BESIDE
    lines = ((_plain(text)[:LONGEST], LARGE_TITLE, INK), (_plain(detail), CAPTION, FAINT))
    width = max(math.ceil(_font(size).getlength(line)) for line, size, _ in lines)
    strip = Image.new("RGB", (left + width + MARGIN, height), PAPER)
    if beside is not None:
        strip.paste(beside, (MARGIN, MARGIN))
    pen, top = ImageDraw.Draw(strip), MARGIN
    for line, size, ink in lines:
        pen.text((left, top), line, ink, _font(size))
        top += size + 8
    return strip


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Join sheets, one below another."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _enlarged(exhibits: Sequence[Exhibit], small: int) -> list[list[Image.Image]]:
    """Panels of each exhibit, enlarged to about the size of the largest one or to the default size."""
    longest = max(max(panel.size) for exhibit in exhibits for _, panel in exhibit.panels)
    target = max(longest, LARGE if len(exhibits) <= FEW else small)

    def enlarge(panel: Image.Image) -> Image.Image:
        factor = target // max(panel.size)
        return panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)

    return [[enlarge(panel) for _, panel in exhibit.panels] for exhibit in exhibits]


def _columns(count: int, block: tuple[int, int]) -> int:
    """Number of columns that makes a sheet of about ``SHAPE`` with few empty cells in its last row."""

    def fault(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = (rows * columns - count) / count
        return 3 * empty + abs(math.log(columns * block[0] / (rows * block[1]) / SHAPE))

    return min(range(1, count + 1), key=fault)


def _text_width(exhibits: Sequence[Exhibit]) -> int:
    """Least width of a cell in pixels that headings and captions fit into."""
    headings = max(_font(CAPTION).getlength(heading) for exhibit in exhibits for heading, _ in exhibit.panels)
    captions = max(
        (_font(CAPTION).getlength(_plain(exhibit.caption)) + GAP) / len(exhibit.panels) - GAP for exhibit in exhibits
    )
    return math.ceil(max(headings, captions)) + 8


def _shortened(text: str, width: int, size: int) -> str:
    """Shorten a text at its beginning, since names differ at their ends."""
    text = shown = _plain(text)
    while _font(size).getlength(shown) > width:
        text = text[1:]
        shown = "..." + text
    return shown


def _plain(text: str) -> str:
    """Replace characters that Pillow's default font lacks: it has ASCII and the middle dot; accents are dropped."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(
        letter if " " <= letter <= "~" or letter == "·" else "?"
        for letter in letters
        if not unicodedata.combining(letter)
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@dataclass(frozen=True)
class SheetImage:
    """Reconstruction of a dataset row on a sheet.

    Attributes:
        row: the row.
        image: RGB reconstruction.
        prefix: text before its caption, above the image.
        detail: text before its key, below the image.
    """

    row: Row
    image: Image.Image
    prefix: str = ""
    detail: str = ""

    def exhibit(self) -> Exhibit:
        """Return the exhibit: the row's label or first caption above the image, the key below it."""
        text, key = self.row.label or (self.row.captions[0] if self.row.captions else ""), self.row.key
        if len(text) > CAPTION_LENGTH:
            text = text[: CAPTION_LENGTH - 3].rstrip() + "..."
        if len(key) > KEY_LENGTH:
            key = "..." + key[3 - KEY_LENGTH :]
        return Exhibit(self.prefix + text, (("", self.image),), self.detail + key)


def write_rows(
    file: Path, images: Sequence[SheetImage], title: str, detail: str, beside: Image.Image | None = None
) -> None:
    """Write a sheet of reconstructed dataset rows.

    Args:
        file: image file to write; its suffix names the format.
        images: images of the sheet; if empty, only the heading is drawn.
        title, detail: large and small line of the heading.
        beside: image to the left of the heading.
    """
    sizes = sorted({len(one.row.tokens) for one in images})
    if sizes:
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        detail += f", reconstructed from {span} bytes of tokens per image"
    sheets = [heading(title, detail, beside)]
    if images:
        sheets.append(draw([one.exhibit() for one in images], small=SMALL if len(images) <= MANY else TINY))
    write_bytes(file, image_file(file, stack(sheets)))
