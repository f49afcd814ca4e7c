"""Building blocks of report pages: images as data URIs (`PageImage`), galleries, tables of records.

A page loads nothing from elsewhere: images lie in it, and its content security policy forbids more.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qlip import assets
from qlip.errors import QLIPError, require
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.report.bundle import Bundle, Side, image_name
from qlip.evaluation.report.compare import titled

ENDS = ("worst_", "best_")
"""Prefixes of the tables of the worst and best images; the name of a metric follows."""
SHOWN = 8
"""Images shown of the worst and of the best."""
MOST_RECORDS = 200
"""Rows of a table on a page; the others are in the result's file."""
_SMALL = 160
"""Pixels a side up to which images are shown enlarged, pixel by pixel."""


@dataclass(frozen=True)
class PageImage:
    """An image in a page.

    Attributes:
        data: URI that holds its PNG.
        width, height: pixels.
        alt: what it shows, for those who do not see it.
        title: below it.
    """

    data: str
    width: int
    height: int
    alt: str
    title: str

    @property
    def small(self) -> bool:
        """To be enlarged without smoothing."""
        return max(self.width, self.height) <= _SMALL


@dataclass(frozen=True)
class Shown:
    """An image of a set in its sides, e.g. original and rebuilt."""

    key: str
    said: str
    sides: list[PageImage]


@dataclass(frozen=True)
class Gallery:
    """Images under one title."""

    title: str
    images: list[Shown]

    @property
    def wide(self) -> bool:
        """A line an image, as there are more sides than two."""
        return any(len(one.sides) > 2 for one in self.images)


@dataclass(frozen=True)
class Records:
    """A table of a page; ``words`` has cells aligned left."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    words: bool = False


def rendered(template: str, **values: object) -> str:
    """A page of the package's templates, everything escaped that is not marked as safe."""
    jinja = require("jinja2", extra="eval")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(assets.path("report")),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = require("markupsafe", extra="eval").Markup(assets.path("report", "style.css").read_text(encoding="utf-8"))
    page: str = environment.get_template(template).render(style=style, **values)
    return page


def safe(html: str) -> Any:
    """HTML that is escaped already."""
    return require("markupsafe", extra="eval").Markup(html)


def page_image(path: Path, alt: str, title: str = "") -> PageImage:
    """A PNG file as data.

    Raises:
        QLIPError: it cannot be read.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
    except OSError as error:
        raise QLIPError(
            f"{path}: cannot be read ({error.strerror or 'not an image'}); write the folder again"
        ) from None
    return PageImage(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height, alt, title)


def galleries(metric_result: MetricResult, others: Mapping[str, Bundle], rows: Mapping[str, int]) -> list[Gallery]:
    """The worst and best images that a metric_result's tables name, as far as bundles hold them.

    At most `SHOWN` each, those in order from the first; of a few images none is among both.

    Args:
        metric_result: whose tables name keys.
        others: bundles by model, the metric_result's own first; each shows what it rebuilt.
        rows: by model, the place of the measurement in its bundle.
    """
    found = []
    worst: dict[str, list[str]] = {}
    for name, records in metric_result.tables.items():
        if not name.startswith(ENDS):
            continue
        end, _, metric = name.partition("_")
        there = [record for record in records if "key" in record and str(record["key"]) not in worst.get(metric, [])]
        kept: list[Shown] = []
        for record in there[:SHOWN]:
            if (one := _shown(record, metric, others, rows)) is None:
                break
            kept.append(one)
        if kept:
            found.append(Gallery(f"{end.capitalize()} by {titled(metric)}", kept))
            if end == "worst":
                worst[metric] = [one.key for one in kept]
    return found


def _shown(
    record: Mapping[str, object], metric: str, others: Mapping[str, Bundle], rows: Mapping[str, int]
) -> Shown | None:
    key = str(record["key"])
    said = f"{titled(metric)} {spelled(record.get(metric))}"
    said += f" by {next(iter(others))}" if len(others) > 1 else ""
    sides: list[PageImage] = []
    for at, (model, bundle) in enumerate(others.items()):
        wanted: tuple[tuple[Side, str], ...] = (("rebuilt", model if len(others) > 1 else "rebuilt"),)
        if at == 0:
            wanted = (("original", "original"), *wanted)
        for side, title in wanted:
            path = bundle.images.get(image_name(rows[model], key, side))
            if path is None and at == 0:
                return None
            if path is not None:
                alt = f"{key}, original" if side == "original" else f"{key}, rebuilt by {model}"
                sides.append(page_image(path, alt if at else f"{alt}; {said}", title))
    return Shown(key, said, sides)


def records_of(name: str, records: Sequence[Mapping[str, object]]) -> Records:
    """A metric_result's table, its first rows."""
    head = list(dict.fromkeys(key for record in records for key in record))
    rows = [[spelled(record.get(key)) for key in head] for record in records[:MOST_RECORDS]]
    few = (
        f"the first {MOST_RECORDS} of {len(records):,} rows; all are in the result's file"
        if len(records) > len(rows)
        else ""
    )
    title = f"{name.replace('_', ' ')} ({len(records):,} rows)"
    return Records(title, few or name.replace("_", " "), [one.replace("_", " ") for one in head], rows)


def spelled(value: object) -> str:
    """A cell's content: numbers with four digits, nothing as a dash."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
