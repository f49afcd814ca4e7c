"""Metrics on the terminal: a table per evaluator, and notes about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlip.cli.console import new_table, note, print_table, say, show

if TYPE_CHECKING:
    from qlip.evaluation.evaluators.base import MetricValue
    from qlip.evaluation.report.result import Difference, EvalResult, Result

HEADLINES = {
    "reconstruction": (
        "psnr",
        "psnr_exact",
        "ssim",
        "ms_ssim",
        "l1",
        "lpips_vgg",
        "lpips_alex",
        "shrink_psnr",
        "bits_per_pixel",
    ),
    "codebook": ("bit_entropy", "bit_entropy_min", "dead_bits", "tied_bits"),
}
"""Metrics in the table of an evaluator; others show all. The JSON always has all."""
MOST_COLUMNS = 8
"""Metrics in one row; more are printed as rows."""
AS_THEY_ARE = {"PairedFiles": "Compared as the files are", "GeneratedPictures": "Generated images as they are"}
"""Descriptions of images that no checkpoint prepared."""


def print_differences(differences: list[Difference]) -> None:
    """Print claimed and measured values that differ."""
    table = new_table("metric", "claimed", "measured", numbers=("claimed", "measured"))
    for one in differences:
        table.add_row(one.name, str(one.was), str(one.now))
    print_table(table)


def print_results(results: list[Result]) -> None:
    """Print a table per evaluator, with a row per set and model."""
    rows = [(result.subject["name"], one) for result in results for one in result.measured]
    for number, name in enumerate(dict.fromkeys(one.evaluator for _, one in rows)):
        if number:
            show()
        _print_evaluator(name, [(model, one) for model, one in rows if one.evaluator == name], len(results) > 1)
    prepared = {_prepared(result, one): None for result in results for one in result.measured}
    for line in prepared:
        show(f"\n{line}.")
    _print_notes(rows)


def _prepared(result: Result, one: EvalResult) -> str:
    kind = result.subject.get("kind")
    if kind in AS_THEY_ARE:
        return f"{AS_THEY_ARE[kind]}: {one.preparation}"
    return f"Prepared {'as the checkpoint says' if one.as_shipped else 'NOT as the checkpoint says'}: {one.preparation}"


def _print_notes(rows: list[tuple[str, EvalResult]]) -> None:
    """Print each note once, with the measurements that it concerns."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for name, one in rows:
        for metric, text in one.notes.items():
            where.setdefault((one.evaluator, metric, text), []).append(f"{name} on {one.data}")
    for (evaluator, metric, text), places in where.items():
        measured = places[0] if len(places) == 1 else f"{len(places)} measurements"
        note(f"{evaluator}, {metric} ({measured}): {text}")
    for _, one in rows:
        for key, reason in one.broken[:3]:
            say(f"{one.data}: {key} was skipped: {reason}")
        if len(one.broken) > 3:
            say(f"{one.data}: {len(one.broken) - 3} more were skipped; the JSON names them")


def _print_evaluator(evaluator: str, rows: list[tuple[str, EvalResult]], several: bool) -> None:
    present = list(dict.fromkeys(name for _, one in rows for name in one.values))
    metrics = [name for name in HEADLINES.get(evaluator, present) if name in present]
    if len(metrics) > max(MOST_COLUMNS, len(rows)):
        _print_transposed(evaluator, rows, several, metrics)
        return
    columns = [*(["model"] if several else []), evaluator, "set", "n", *metrics]
    table = new_table(*columns, numbers=("n", *metrics))
    for model, one in rows:
        cells = [_cell(one.values.get(name)) for name in metrics]
        table.add_row(*([model] if several else []), one.title, one.data, f"{one.count:,}", *cells)
    print_table(table)


def _print_transposed(evaluator: str, rows: list[tuple[str, EvalResult]], several: bool, metrics: list[str]) -> None:
    """Print a row per metric, since as columns they would not fit."""
    table = new_table(evaluator)
    for _, one in rows:
        table.add_column(one.title, justify="right", overflow="fold")
    if several:
        table.add_row("model", *(model for model, _ in rows))
    table.add_row("set", *(one.data for _, one in rows))
    table.add_row("n", *(f"{one.count:,}" for _, one in rows))
    for name in metrics:
        table.add_row(name, *(_cell(one.values.get(name)) for _, one in rows))
    print_table(table)


def _cell(metric: MetricValue | None) -> str:
    """Format a value with its unit."""
    if metric is None:
        return "-"
    if metric.value.is_integer() and abs(metric.value) < 1e6:
        return f"{metric.value:,.0f}{_unit(metric.unit)}"
    digits = 2 if metric.unit in ("dB", "bit") else 1 if metric.unit == "%" or abs(metric.value) >= 100 else 3
    return f"{metric.value:.{digits}f}{_unit(metric.unit)}"


def _unit(unit: str) -> str:
    return "%" if unit == "%" else f" {unit}" if unit else ""
