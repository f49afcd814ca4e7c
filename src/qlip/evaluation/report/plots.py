"""Plots of several models: quality against bits, and meaning against fidelity (figure 1 of arXiv 2502.05178)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlip.errors import QLIPError, require
from qlip.evaluation.evaluators.base import MetricValue
from qlip.evaluation.models.codecs import CodecEvalModel
from qlip.evaluation.report import drawing
from qlip.evaluation.report.compare import Comparison
from qlip.evaluation.report.drawing import COLOURS
from qlip.evaluation.report.table import titled

MARKERS = "osD^vPX"
FIDELITY = ("rfid", "fd_resnet50", "fd_vgg16", "lpips_vgg", "psnr")
MEANING = ("zero_shot_top1", "prompt_top1", "linear_top1", "knn_top1")
"""Metrics of the plot of meaning against fidelity: those that most models have, the first of equals."""
WIDE = 76
"""Characters of a caption that fit into the width of a panel."""
LONG = 32
"""Characters of a name above which the legend is below the axes."""


@dataclass(frozen=True)
class Point:
    """A model in a plot.

    Attributes:
        model: its name, with how its images were prepared where that differs.
        curve: of several points, e.g. a codec at several budgets; None for one that stands alone.
        x, y: its metrics.
    """

    model: str
    curve: str | None
    x: MetricValue
    y: MetricValue


Panel = tuple[str, list[Point]]
"""A panel's caption and its points."""


def rate_distortion(tables: Sequence[Comparison], path: Path, metric: str = "psnr") -> list[Panel]:
    """Write a PNG of bits per pixel against a metric of reconstruction, a panel per set; codecs are joined to curves.

    Args:
        tables: of :func:`qlip.evaluation.report.compare.compare`; a codec at several budgets is several rows.
        path: of the image.
        metric: ``psnr``, ``ssim``, ``lpips_vgg``, ... of the evaluator ``reconstruction``.

    Returns:
        The panels that were drawn.

    Raises:
        QLIPError: no result has that metric, no matplotlib, or a path that cannot be written.
    """
    panels: list[Panel] = []
    for table in tables:
        points = []
        for row in table.rows:
            if table.first.evaluator == "reconstruction" and {metric, "bits_per_pixel"} <= set(row.metrics):
                differs = "" if table.preparation else row.preparation
                codec = _named(row.model.partition(",")[0], differs) if row.kind == CodecEvalModel.kind else None
                x, y = row.metrics["bits_per_pixel"], row.metrics[metric]
                points.append(Point(_named(row.model, differs), codec, x, y))
        if points:
            panels.append((table.caption, points))
    if not panels:
        raise QLIPError(f"{path}: not drawn, since no result has both {metric} of reconstructions and bits per pixel")
    _save(panels, path, "bits per pixel", _label(metric, panels[0][1][0].y), log=True)
    return panels


def meaning_against_fidelity(
    tables: Sequence[Comparison], path: Path, fidelity: str | None = None, meaning: str | None = None
) -> list[Panel]:
    """Write a PNG of accuracy in naming images against fidelity of reconstructions, up and right being better.

    Args:
        tables: of :func:`qlip.evaluation.report.compare.compare`.
        path: of the image.
        fidelity, meaning: metrics; by default those of :data:`FIDELITY` and :data:`MEANING` that most models have.

    Returns:
        The panel that was drawn.

    Raises:
        QLIPError: no model has both, no matplotlib, or a path that cannot be written.
    """
    found = []
    for kind, names in (
        ("measures how well images are reconstructed", (fidelity,) if fidelity else FIDELITY),
        ("measures how well images are classified", (meaning,) if meaning else MEANING),
    ):
        if not (axes := _axes(names, tables)):
            raise QLIPError(f"{path}: not drawn, since no result has a metric that {kind} ({' or '.join(names)})")
        found.append(axes)
    x, y = max(product(*found), key=lambda pair: len(pair[0].metrics.keys() & pair[1].metrics.keys()))
    both = [key for key in x.metrics if key in y.metrics]
    if not both:
        raise QLIPError(f"{path}: not drawn, since no model has both {x.name} and {y.name}")
    differ = len({preparation for _, preparation in both}) > 1
    points = [Point(_named(key[0], key[1] if differ else ""), None, x.metrics[key], y.metrics[key]) for key in both]
    panels = [(f"{x.caption}\n{y.caption}", points)]
    _save(panels, path, _label(x.name, points[0].x), _label(y.name, points[0].y), log=False)
    return panels


@dataclass(frozen=True)
class _Axis:
    """A metric that may be compared: its name, what it is over, and its values by model and preparation.

    The preparation is "" unless preparations are mixed; where they are, a model at two sizes has two values.
    """

    name: str
    caption: str
    metrics: dict[tuple[str, str], MetricValue]


def _axes(names: Sequence[str], tables: Sequence[Comparison]) -> list[_Axis]:
    """Return all columns of these names, in the order of the names; one over different classes is several."""
    mixed = not all(table.preparation for table in tables)
    found: list[_Axis] = []
    for name, table in product(names, tables):
        for part in table.parts(name):
            held = [row for row in table.rows if name in row.metrics and row.metrics[name].part == part]
            caption = f"{table.caption}, {part}" if part else table.caption
            metrics = {(row.model, row.preparation if mixed else ""): row.metrics[name] for row in held}
            found.append(_Axis(name, caption, metrics))
    return found


def _named(name: str, preparation: str) -> str:
    return f"{name}, {preparation}" if preparation else name


def _label(name: str, metric: MetricValue) -> str:
    unit = f", {metric.unit}" if metric.unit else ""
    better = f" ({metric.better} is better)" if metric.better else ""
    return f"{titled(name)}{unit}{better}"


def _save(panels: Sequence[Panel], path: Path, x: str, y: str, log: bool) -> None:
    count = len(panels)
    across = min(count, 3)
    rows = -(-count // across)
    figure = drawing.new_figure(5.2 * across + 0.3, 4.3 * rows)
    grid = figure.subplots(rows, across, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes, (caption, points) in zip(grid, panels, strict=False):
        _draw(axes, points, log)
        axes.set_title(_wrapped(caption), fontsize=8, loc="left")
        axes.set(xlabel=x, ylabel=y)
        drawing.add_grid(axes)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.save(figure, path, dpi=140)


def _wrapped(caption: str) -> str:
    """A caption in lines that its panel is wide enough for."""
    lines = (textwrap.wrap(line, WIDE, subsequent_indent="  ", break_on_hyphens=False) for line in caption.split("\n"))
    return "\n".join(piece for pieces in lines for piece in pieces)


def _draw(axes: Any, points: Sequence[Point], log: bool) -> None:
    """Curves first, in thin lines; single subjects above them, larger; a legend that says which is which."""
    curves = list(dict.fromkeys(one.curve for one in points if one.curve is not None))
    alone = [one for one in points if one.curve is None]
    for at, curve in enumerate(curves):
        some = sorted((one for one in points if one.curve == curve), key=lambda one: one.x.value)
        style = {"color": COLOURS[at % len(COLOURS)], "linewidth": 1.2, "markersize": 4 if len(some) > 1 else 11}
        axes.plot([p.x.value for p in some], [p.y.value for p in some], marker=".", label=curve, **style)
    for at, one in enumerate(alone):
        colour = COLOURS[(at + len(curves)) % len(COLOURS)]
        marker = MARKERS[at // len(COLOURS) % len(MARKERS)] if not curves else "*"
        errors = {"xerr": _errors(one.x), "yerr": _errors(one.y)}
        axes.errorbar(
            one.x.value,
            one.y.value,
            **errors,
            color=colour,
            marker=marker,
            markersize=11 if marker == "*" else 7,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=one.model,
        )
    if points[0].x.better == "lower" and not log:
        axes.invert_xaxis()  # better is right
    if log and all(one.x.value > 0 for one in points):
        axes.set_xscale("log")
        tickers = require("matplotlib.ticker", extra="eval")
        axes.xaxis.set_major_locator(tickers.LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(tickers.NullFormatter())
    axes.margins(0.12)
    if log:
        _widen(axes, [one.x.value for one in points])
    _, labels = axes.get_legend_handles_labels()
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.16)}  # long ones would hide what is drawn
    where = below if max(map(len, labels)) > LONG else {"loc": "best"}
    axes.legend(fontsize=8, frameon=False, **where)


def _widen(axes: Any, values: Sequence[float]) -> None:
    """Bytes that are equal but for a few per cent look so: the axis spans a factor of two at least."""
    least, most = min(values), max(values)
    if 0 < most < 2 * least:
        middle = (least * most) ** 0.5
        axes.set_xlim(middle / 2**0.5, middle * 2**0.5)


def _errors(figure: MetricValue) -> list[list[float]] | None:
    if figure.low is None or figure.high is None:
        return None
    return [[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]]
