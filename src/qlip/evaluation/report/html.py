"""A result, or a comparison of several, as one HTML file that loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlip.errors import require
from qlip.evaluation.evaluators.base import MetricResult, MetricValue
from qlip.evaluation.report.bundle import DRAWN, REPORT, Bundle, plot_name, read_bundle
from qlip.evaluation.report.compare import Column, compare, names_of, written
from qlip.evaluation.report.pages import (
    ENDS,
    Gallery,
    PageImage,
    Records,
    galleries,
    page_image,
    records_of,
    rendered,
    safe,
)
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.report.tables import chosen, html
from qlip.files import write_text

PLOTS = {
    "codebook": "Where entropy is in the image, that of each bit, and what bits tell of each other.",
    "confusion": "Confusion matrix: rows are what images show, columns what they were called.",
}
"""Caption of a plot by its name in the bundle."""


@dataclass(frozen=True)
class Section:
    """One evaluator on one set, as a page shows it."""

    number: int
    title: str
    evaluator: str
    of: str
    metrics: Records
    notes: list[tuple[str, str]]
    plots: list[PageImage]
    galleries: list[Gallery]
    tables: list[Records]
    fingerprints: Records
    settings: str
    broken: Records | None


def require_packages() -> None:
    """Check the packages that pages and their plots need, before what they show is measured. Raises QLIPError."""
    for module in ("jinja2", "matplotlib.figure"):
        require(module, extra="eval")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a bundle's folder.

    Args:
        folder: that :func:`qlip.evaluation.report.bundle.write_bundle` wrote.

    Returns:
        Its path.

    Raises:
        QLIPError: no bundle, an image that cannot be read, or a folder that cannot be written.
    """
    write_text(folder / REPORT, report(read_bundle(folder)))
    return folder / REPORT


def report(bundle: Bundle) -> str:
    """The page of a bundle."""
    result = bundle.result
    rows = enumerate(zip(result.measured, bundle.metric_results, strict=True))
    subject = {key: result.subject.get(key, "?") for key in ("name", "kind", "fingerprint", "device", "dtype")}
    return rendered(
        "report.html",
        title=f"{subject['name']}, measured",
        subject=subject,
        time=_time(result),
        version=result.packages.get("qlip") or "?",
        warnings=_warnings(result),
        sections=[_section(bundle, number, one, metric_result) for number, (one, metric_result) in rows],
        provenance=_provenance(result),
    )


def _time(result: Result) -> str:
    return result.time.replace("T", " ").replace("+00:00", " UTC")


def _warnings(result: Result) -> list[str]:
    found = [] if result.complete else ["The run was stopped before its last measurement: this is not all of it."]
    if any(not one.as_shipped for one in result.measured):
        found.append("Images were prepared in another way than the checkpoint's own.")
    if broken := sum(len(one.broken) for one in result.measured):
        found.append(f"{broken:,} images could not be read and are not counted; they are named at the end.")
    limited = sorted({one.data for one in result.measured if one.limit is not None and one.count >= one.limit})
    if limited:
        found.append(f"Not the whole of {', '.join(limited)} was measured, but a part of its images.")
    return found


def _section(bundle: Bundle, number: int, one: EvalResult, metric_result: MetricResult) -> Section:
    model = bundle.result.subject.get("name", "?")
    shown = galleries(metric_result, {model: bundle}, {model: number})
    hidden = {name for name in metric_result.tables if name.startswith(ENDS)} if shown else set()
    return Section(
        number,
        one.title,
        one.evaluator.replace("_", " "),
        f"{one.data}: {one.count:,} images, {one.prepared}",
        _figures(one),
        list(one.notes.items()),
        _plots(bundle, number, one),
        shown,
        [records_of(name, table) for name, table in metric_result.tables.items() if table and name not in hidden],
        _fingerprints(one),
        json.dumps(one.settings, indent=1, ensure_ascii=False),
        _broken(one),
    )


def _figures(one: EvalResult) -> Records:
    rows = []
    for name, metric in one.values.items():
        title = Column(name, metric.unit, metric.better).title
        rows.append([title, written(metric), _interval(metric), f"{metric.count:,}"])
    caption = "Intervals are 95%, over images; \u2191 higher is better, \u2193 lower is better."
    return Records("", caption, ["metric", "value", "interval", "images"], rows)


def _interval(metric: MetricValue) -> str:
    return "" if metric.low is None or metric.high is None else written(metric, True).partition(" ")[2]


def _plots(bundle: Bundle, number: int, one: EvalResult) -> list[PageImage]:
    if one.evaluator not in DRAWN:
        return []
    plot = DRAWN[one.evaluator][0]
    path = bundle.images.get(plot_name(number, plot))
    return [] if path is None else [page_image(path, f"{PLOTS[plot]} {one.title}, {one.data}.", PLOTS[plot])]


def _fingerprints(one: EvalResult) -> Records:
    rows = [
        ["set", one.data],
        ["images", f"{one.count:,}{_limited(one)}"],
        ["preparation", one.preparation],
        ["digest of the images", one.digest],
    ]
    return Records("", f"{one.evaluator} on {one.data}", ["", ""], rows, words=True)


def _broken(one: EvalResult) -> Records | None:
    if not one.broken:
        return None
    return Records("", "images left out", ["key", "reason"], [list(pair) for pair in one.broken], words=True)


def _provenance(result: Result) -> Records:
    packages = ", ".join(f"{name} {version}" for name, version in result.packages.items() if version)
    rows = [
        ["model", result.subject.get("name", "?")],
        ["fingerprint", result.subject.get("fingerprint", "?")],
        ["command", result.command],
        ["time", _time(result)],
        ["machine", result.machine],
        ["packages", packages],
        ["seed", str(result.seed)],
    ]
    return Records("", "Model, machine and command", ["", ""], rows, words=True)


def write_comparison(
    path: Path,
    bundles: Sequence[Bundle],
    *,
    mixed: bool = False,
    intervals: bool = True,
    plots: Mapping[str, Path] | None = None,
    only: Sequence[str] = (),
) -> Path:
    """Write a page of several measurements: tables, plots, and the first one's worst and best images by everyone.

    Args:
        path: of the page.
        bundles: to compare; of bare results, metrics alone.
        mixed: see :func:`qlip.evaluation.report.compare.compare`.
        intervals: write them into the tables.
        plots: PNG files by what stands below them, e.g. of :mod:`qlip.evaluation.report.plots`.
        only: these metrics, and images that are worst and best by them; all where none is named.

    Returns:
        The page's path.

    Raises:
        QLIPError: nothing to compare, different preparations without ``mixed``, no such metric, or a plot that cannot
            be read.
    """
    tables = compare(bundles, mixed=mixed)
    tables = chosen(tables, only) if only else tables
    subjects = names_of([one.result for one in bundles])
    names = list(dict.fromkeys(subjects))
    named = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"
    page = rendered(
        "comparison.html",
        title=f"{named}, compared",
        plots=[page_image(file, title, title) for title, file in (plots or {}).items()],
        tables=safe("".join(html(one, intervals) for one in tables)),
        galleries=_side_by_side(subjects, bundles, only),
        provenance=_subjects([one.result for one in bundles]),
    )
    write_text(path, page)
    return path


def _side_by_side(subjects: Sequence[str], bundles: Sequence[Bundle], only: Sequence[str]) -> list[Gallery]:
    """The images that the first bundle shows, and what others made of the same ones."""
    first = bundles[0]
    found: list[Gallery] = []
    for number, (one, metric_result) in enumerate(zip(first.result.measured, first.metric_results, strict=True)):
        if only:
            kept = {name: one for name, one in metric_result.tables.items() if name.partition("_")[2] in only}
            metric_result = replace(metric_result, tables=kept)
        others, rows = {subjects[0]: first}, {subjects[0]: number}
        for name, bundle in zip(subjects[1:], bundles[1:], strict=True):
            same = [at for at, other in enumerate(bundle.result.measured) if _same(one, other)]
            if not same:
                continue
            prepared = bundle.result.measured[same[0]].prepared
            if name in others and others[name].result.measured[rows[name]].prepared != prepared:
                name = f"{name}, {prepared}"  # a model at another size
            if name not in others:
                others[name], rows[name] = bundle, same[0]
        for gallery in galleries(metric_result, others, rows):
            found.append(Gallery(f"{gallery.title}, {one.title}", gallery.images))
    return found


def _same(one: EvalResult, other: EvalResult) -> bool:
    return (one.evaluator, one.data, one.digest) == (other.evaluator, other.data, other.digest)


def _subjects(results: Sequence[Result]) -> Records:
    rows = [
        [
            one.subject.get("name", "?"),
            one.subject.get("kind", "?"),
            one.subject.get("fingerprint", "?"),
            _time(one),
            one.command,
        ]
        for one in results
    ]
    return Records("", "One line a result", ["model", "kind", "fingerprint", "time", "command"], rows, words=True)


def _limited(one: EvalResult) -> str:
    if one.limit is None:
        return ""
    return f", {'drawn at random' if one.drawn else 'the first ones'}, {one.limit:,} at most"
