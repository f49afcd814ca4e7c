"""Pictures that show what the model does: original, rebuilt and difference side by side, with captions."""

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
TITLE, CAPTION = 19, 16
SHAPE = 1.4  # width over height that the whole is laid out for
HEADINGS = ("rebuilt from its bytes", f"difference x {GAIN}")


@dataclass(frozen=True)
class Comparison:
    """One picture and what became of it.

    Attributes:
        original: what the model saw, RGB.
        rebuilt: of the same size.
        title: its name.
        caption: the figures.
    """

    original: Image.Image
    rebuilt: Image.Image
    title: str
    caption: str

    def panels(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Original, rebuilt, and their difference times ``GAIN``."""
        difference = ImageChops.difference(self.original, self.rebuilt)
        return self.original, self.rebuilt, difference.point(lambda value: min(255, GAIN * value))


def draw(comparisons: Sequence[Comparison]) -> Image.Image:
    """All comparisons in one picture, small ones enlarged by whole factors so that every pixel stays a square.

    Args:
        comparisons: at least one.
    """
    factor = _factor(comparisons)
    cell = (
        max(_text_width(comparisons), *(c.original.width * factor for c in comparisons)),
        max(c.original.height * factor for c in comparisons),
    )
    block = (3 * cell[0] + 2 * GAP, TITLE + 10 + cell[1] + 8 + CAPTION + 8)
    columns = _columns(len(comparisons), block)
    rows = math.ceil(len(comparisons) / columns)
    step = (block[0] + 2 * MARGIN, block[1] + MARGIN)
    sheet = Image.new("RGB", (columns * step[0], rows * step[1] + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, comparison in enumerate(comparisons):
        corner = (MARGIN + i % columns * step[0], MARGIN + i // columns * step[1])
        _draw_block(sheet, pen, comparison, corner, cell, factor)
    return sheet


def _draw_block(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    comparison: Comparison,
    corner: tuple[int, int],
    cell: tuple[int, int],
    factor: int,
) -> None:
    left, top = corner
    pen.text((left, top), _shortened(comparison.title, cell[0], TITLE), INK, _font(TITLE))
    for i, heading in enumerate(HEADINGS, start=1):
        pen.text((left + i * (cell[0] + GAP), top + TITLE - CAPTION), heading, FAINT, _font(CAPTION))
    top += TITLE + 10
    for i, panel in enumerate(comparison.panels()):
        enlarged = panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + i * (cell[0] + GAP), top))
    below = top + comparison.original.height * factor + 8
    pen.text((left, below), _shortened(comparison.caption, 3 * cell[0] + 2 * GAP, CAPTION), FAINT, _font(CAPTION))


def _factor(comparisons: Sequence[Comparison]) -> int:
    """How much to enlarge: a few pictures are shown larger than many."""
    longest = max(max(c.original.size) for c in comparisons)
    wanted = 384 if len(comparisons) <= 2 else 192
    return max(1, wanted // longest)


def _columns(count: int, block: tuple[int, int]) -> int:
    """Blocks side by side, for a sheet of about ``SHAPE``."""

    def distance(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * block[0] / (rows * block[1]) / SHAPE))

    return min(range(1, count + 1), key=distance)


def _text_width(comparisons: Sequence[Comparison]) -> int:
    """Width of a cell below which headings and captions would not fit."""
    headings = max(_font(CAPTION).getlength(heading) for heading in HEADINGS)
    captions = max(_font(CAPTION).getlength(_plain(c.caption)) for c in comparisons)
    return math.ceil(max(headings, (captions - 2 * GAP) / 3)) + 8


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
