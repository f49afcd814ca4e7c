"""A result, or a comparison of several, as one HTML file that loads nothing else.

Images lie in the page as data URIs, and its content security policy forbids more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlip import assets
from qlip.errors import require
from qlip.evaluation.report.bundle import DRAWN, REPORT, Bundle, plot_name, read_bundle
from qlip.evaluation.report.compare import Comparison, names_of
from qlip.evaluation.report.galleries import ENDS, Gallery, PageImage, galleries, page_image
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.report.table import Table, heading, html, interval, number, spelled, text_table
from qlip.files import write_text

PLOTS = {
    "codebook": "Where entropy is in the image, that of each bit, and what bits tell of each other.",
    "confusion": "Confusion matrix: rows are what images show, columns what they were called.",
}
"""Caption of a plot by its name in the bundle."""
MOST_RECORDS = 200
"""Rows of a table on a page; the others are in the result's file."""


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
    """Return the page of a bundle."""
    result = bundle.result
    subject = {key: result.subject.get(key, "?") for key in ("name", "kind", "fingerprint", "device", "dtype")}
    return _rendered(
        "report.html",
        title=f"{subject['name']}, measured",
        subject=subject,
        time=_time(result),
        version=result.packages.get("qlip") or "?",
        warnings=_warnings(result),
        sections=[_section(bundle, row) for row in range(len(result.measured))],
        provenance=_provenance(result),
    )


def write_comparison(
    path: Path,
    bundles: Sequence[Bundle],
    comparisons: Sequence[Comparison],
    *,
    intervals: bool = True,
    plots: Mapping[str, Path] | None = None,
    only: Sequence[str] = (),
) -> Path:
    """Write a page of several measurements: tables, plots, and the first one's worst and best images by everyone.

    Args:
        path: of the page.
        bundles: compared; of bare results, metrics alone.
        comparisons: of these, from :func:`qlip.evaluation.report.compare.compare`.
        intervals: write them into the tables.
        plots: PNG files by what stands below them, e.g. of :mod:`qlip.evaluation.report.plots`.
        only: show images that are worst and best by these metrics; by all where none is named.

    Returns:
        The page's path.

    Raises:
        QLIPError: a plot cannot be read.
    """
    subjects = names_of([one.result for one in bundles])
    names = list(dict.fromkeys(subjects))
    named = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"
    page = _rendered(
        "comparison.html",
        title=f"{named}, compared",
        plots=[page_image(file, title, title) for title, file in (plots or {}).items()],
        tables=[one.table(intervals) for one in comparisons],
        galleries=_side_by_side(subjects, bundles, only),
        provenance=_results([one.result for one in bundles]),
    )
    write_text(path, page)
    return path


def _rendered(template: str, **values: object) -> str:
    """Render a page of the package's templates, everything escaped but tables, which are escaped already."""
    jinja = require("jinja2", extra="eval")
    markup = require("markupsafe", extra="eval").Markup
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(assets.path("report")),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = lambda table: markup(html(table))
    style = markup(assets.path("report", "style.css").read_text(encoding="utf-8"))
    page: str = environment.get_template(template).render(style=style, **values)
    return page


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


def _section(bundle: Bundle, row: int) -> dict[str, Any]:
    """Collect what the page shows of one evaluator on one set."""
    one, metric_result = bundle.result.measured[row], bundle.metric_results[row]
    model = bundle.result.subject.get("name", "?")
    shown = galleries(metric_result, {model: bundle}, {model: row})
    records = {
        f"{name.replace('_', ' ')} ({len(table):,} rows)": records_of(name, table)
        for name, table in metric_result.tables.items()
        if table and not (shown and name.startswith(ENDS))
    }
    return {
        "row": row,
        "title": f"{one.title}: {one.evaluator.replace('_', ' ')}",
        "data": f"{one.data}: {one.count:,} images, {one.prepared}",
        "notes": one.notes,
        "metrics": _metrics(one),
        "plots": _plots(bundle, row, one),
        "galleries": shown,
        "records": records,
        "fingerprints": _fingerprints(one),
        "settings": json.dumps(one.settings, indent=1, ensure_ascii=False) if one.settings else "",
        "broken": text_table("images left out", ["key", "reason"], one.broken, prose=True) if one.broken else None,
    }


def _metrics(one: EvalResult) -> Table:
    rows = [
        [heading(name, metric), number(metric.value, metric.unit), interval(metric), f"{metric.count:,}"]
        for name, metric in one.values.items()
    ]
    caption = "Intervals are 95%, over images; \u2191 higher is better, \u2193 lower is better."
    return text_table(caption, ["metric", "value", "interval", "images"], rows)


def _plots(bundle: Bundle, row: int, one: EvalResult) -> list[PageImage]:
    if one.evaluator not in DRAWN:
        return []
    plot = DRAWN[one.evaluator][0]
    path = bundle.images.get(plot_name(row, plot))
    return [] if path is None else [page_image(path, f"{PLOTS[plot]} {one.title}, {one.data}.", PLOTS[plot])]


def _fingerprints(one: EvalResult) -> Table:
    drawn = "drawn at random" if one.drawn else "the first ones"
    limited = "" if one.limit is None else f", {drawn}, {one.limit:,} at most"
    rows = [
        ["set", one.data],
        ["images", f"{one.count:,}{limited}"],
        ["preparation", one.preparation],
        ["digest of the images", one.digest],
    ]
    return text_table(f"{one.evaluator} on {one.data}", ["", ""], rows, prose=True)


def _provenance(result: Result) -> Table:
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
    return text_table("Model, machine and command", ["", ""], rows, prose=True)


def _results(results: Sequence[Result]) -> Table:
    keys = ("name", "kind", "fingerprint")
    rows = [[*(one.subject.get(key, "?") for key in keys), _time(one), one.command] for one in results]
    return text_table("One line per result", ["model", "kind", "fingerprint", "time", "command"], rows, prose=True)


def records_of(name: str, records: Sequence[Mapping[str, object]]) -> Table:
    """Return the first rows of a table of a metric result."""
    head = list(dict.fromkeys(key for record in records for key in record))
    rows = [[spelled(record.get(key)) for key in head] for record in records[:MOST_RECORDS]]
    caption = name.replace("_", " ")
    if len(records) > len(rows):
        caption = f"the first {MOST_RECORDS} of {len(records):,} rows; all are in the result's file"
    return text_table(caption, [one.replace("_", " ") for one in head], rows)


def _side_by_side(subjects: Sequence[str], bundles: Sequence[Bundle], only: Sequence[str]) -> list[Gallery]:
    """Collect the images that the first bundle shows, with the others' reconstructions of them."""
    first = bundles[0]
    found: list[Gallery] = []
    for row, (one, metric_result) in enumerate(zip(first.result.measured, first.metric_results, strict=True)):
        if only:
            kept = {name: one for name, one in metric_result.tables.items() if name.partition("_")[2] in only}
            metric_result = replace(metric_result, tables=kept)
        others, rows = {subjects[0]: first}, {subjects[0]: row}
        for name, bundle in zip(subjects[1:], bundles[1:], strict=True):
            measured = bundle.result.measured
            place = next((at for at, other in enumerate(measured) if _same_images(one, other)), None)
            if place is None:
                continue
            if name in others and others[name].result.measured[rows[name]].prepared != measured[place].prepared:
                name = f"{name}, {measured[place].prepared}"  # a model at another size
            if name not in others:
                others[name], rows[name] = bundle, place
        shown = galleries(metric_result, others, rows)
        found += [Gallery(f"{gallery.title}, {one.title}", gallery.images) for gallery in shown]
    return found


def _same_images(one: EvalResult, other: EvalResult) -> bool:
    return (one.evaluator, one.data, one.digest) == (other.evaluator, other.data, other.digest)
