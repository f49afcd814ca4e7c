"""Images in a page: the worst and best ones of a metric, with what each model made of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.report.bundle import Bundle, image_name
from qlip.evaluation.report.table import spelled, titled

ENDS = ("worst_", "best_")
"""Prefixes of the tables of the worst and best images; the name of a metric follows."""
SHOWN = 8
"""Images shown of the worst and of the best."""
_SMALL = 160
"""Pixels a side up to which images are shown enlarged, pixel by pixel."""


@dataclass(frozen=True)
class PageImage:
    """An image in a page.

    Attributes:
        data: URI that holds its PNG.
        width, height: pixels.
        alt: description for those who do not see it.
        title: below it.
    """

    data: str
    width: int
    height: int
    alt: str
    title: str

    @property
    def small(self) -> bool:
        """True for an image that is enlarged without smoothing."""
        return max(self.width, self.height) <= _SMALL


@dataclass(frozen=True)
class Shown:
    """An image of a set: its key, the metric of it, and its sides, e.g. original and rebuilt."""

    key: str
    metric: str
    sides: list[PageImage]


@dataclass(frozen=True)
class Gallery:
    """Images under one title."""

    title: str
    images: list[Shown]

    @property
    def wide(self) -> bool:
        """True for images of more than two sides, which have a line each."""
        return any(len(one.sides) > 2 for one in self.images)


def page_image(path: Path, alt: str, title: str = "") -> PageImage:
    """Read a PNG file as data.

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
    """Collect the worst and best images that a result's tables name, as far as bundles hold them.

    At most `SHOWN` each, those in order from the first; of a few images none is among both.

    Args:
        metric_result: its tables name keys.
        others: bundles by model, the result's own first; each shows its reconstruction.
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
    """Return the original of an image and each model's reconstruction; None if the first bundle lacks one of them."""
    key, first = str(record["key"]), next(iter(others))
    value = f"{titled(metric)} {spelled(record.get(metric))}{f' by {first}' if len(others) > 1 else ''}"
    original = others[first].images.get(image_name(rows[first], key, "original"))
    rebuilt = {model: one.images.get(image_name(rows[model], key, "rebuilt")) for model, one in others.items()}
    if original is None or rebuilt[first] is None:
        return None
    sides = [page_image(original, f"{key}, original; {value}", "original")]
    for model, path in rebuilt.items():
        if path is not None:
            alt = f"{key}, rebuilt by {model}{f'; {value}' if model == first else ''}"
            sides.append(page_image(path, alt, model if len(others) > 1 else "rebuilt"))
    return Shown(key, value, sides)
