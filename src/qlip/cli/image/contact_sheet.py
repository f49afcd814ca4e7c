"""Images that show what the model does: panels such as original, rebuilt and difference, with captions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont

GAIN = 4
"""What the difference is multiplied by, so that an eye sees it."""

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 30), (112, 117, 125)
GAP, MARGIN = 6, 24
TITLE, CAPTION, LARGE_TITLE = 19, 16, 28
BESIDE, LONGEST = 96, 80  # pixels of an image in a heading, letters of a heading
SHAPE = 1.4  # width over height that the whole is laid out for
FEW, LARGE, SMALL = 2, 384, 192  # up to so many exhibits are shown large: pixels that small panels are enlarged to


@dataclass(frozen=True)
class Exhibit:
    """What is shown of one image.

    Attributes:
        title: its name.
        panels: RGB images side by side, each with a heading; the first stands under the title instead.
        caption: the figures.
    """

    title: str
    panels: tuple[tuple[str, Image.Image], ...]
    caption: str


def comparison(original: Image.Image, rebuilt: Image.Image, title: str, caption: str) -> Exhibit:
    """Original, rebuilt, and their difference times ``GAIN``; both RGB and of one size."""
    difference = ImageChops.difference(original, rebuilt).point(lambda value: min(255, GAIN * value))
    panels = (("", original), ("rebuilt from its bytes", rebuilt), (f"difference x {GAIN}", difference))
    return Exhibit(title, panels, caption)


def draw(exhibits: Sequence[Exhibit], columns: int | None = None, small: int = SMALL) -> Image.Image:
    """All exhibits in one image, small panels enlarged by whole factors so that every pixel stays a square.

    Args:
        exhibits: at least one, all with equally many panels.
        columns: exhibits side by side; by default as many as make a sheet of about ``SHAPE``.
        small: pixels that the panels of many exhibits are enlarged to.
    """
    panels = _enlarged(exhibits, small)
    cell = (
        max(_text_width(exhibits), *(panel.width for row in panels for panel in row)),
        max(panel.height for row in panels for panel in row),
    )
    across = len(panels[0]) * (cell[0] + GAP) - GAP
    step = (across + 2 * MARGIN, TITLE + 10 + cell[1] + 8 + CAPTION + 8 + MARGIN)
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
        pen.text((left, below), _shortened(exhibit.caption, across, CAPTION), FAINT, _font(CAPTION))
    return sheet


def heading(text: str, detail: str, beside: Image.Image | None = None) -> Image.Image:
    """What a sheet is of, to stand above it.

    Args:
        text: large.
        detail: small, below it.
        beside: an image to its left, shown ``BESIDE`` pixels high.
    """
    left, height = MARGIN, MARGIN + LARGE_TITLE + 8 + CAPTION + 8
    if beside is not None:
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
    """Sheets one below the other."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _enlarged(exhibits: Sequence[Exhibit], small: int) -> list[list[Image.Image]]:
    """The panels of each exhibit, as large as the largest, or as is comfortable."""
    longest = max(max(panel.size) for exhibit in exhibits for _, panel in exhibit.panels)
    target = max(longest, LARGE if len(exhibits) <= FEW else small)

    def enlarge(panel: Image.Image) -> Image.Image:
        factor = target // max(panel.size)
        return panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)

    return [[enlarge(panel) for _, panel in exhibit.panels] for exhibit in exhibits]


def _columns(count: int, block: tuple[int, int]) -> int:
    """Blocks side by side, for a sheet of about ``SHAPE``."""

    def distance(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * block[0] / (rows * block[1]) / SHAPE))

    return min(range(1, count + 1), key=distance)


def _text_width(exhibits: Sequence[Exhibit]) -> int:
    """Width of a cell below which headings and captions would not fit."""
    headings = max(_font(CAPTION).getlength(heading) for exhibit in exhibits for heading, _ in exhibit.panels)
    captions = max(
        (_font(CAPTION).getlength(_plain(exhibit.caption)) + GAP) / len(exhibit.panels) - GAP for exhibit in exhibits
    )
    return math.ceil(max(headings, captions)) + 8


def _shortened(text: str, width: int, size: int) -> str:
    """The end of a text that is too long: that is where names differ."""
    text = shown = _plain(text)
    while _font(size).getlength(shown) > width:
        text = text[1:]
        shown = "..." + text
    return shown


def _plain(text: str) -> str:
    """The letters that Pillow's own font has: ASCII and the middle dot; accents are dropped."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(
        letter if " " <= letter <= "~" or letter == "·" else "?"
        for letter in letters
        if not unicodedata.combining(letter)
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
