"""Figures on the terminal: a table an evaluator, with what to keep in mind about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlip.cli.console import new_table, print_table, say

if TYPE_CHECKING:
    from qlip.evaluation.evaluators.base import MetricValue
    from qlip.evaluation.report.result import Difference, EvalResult, Result

HEADLINES = {
    "reconstruction": ("psnr", "ssim", "ms_ssim", "l1", "lpips_vgg", "lpips_alex", "shrink_psnr", "bits_per_pixel"),
    "codebook": ("bit_entropy", "bit_entropy_min", "dead_bits", "tied_bits"),
}
"""Which figures the table on the terminal has; all of them where nothing is said. The JSON has all."""
MOST = 8
"""Figures side by side."""
AS_THEY_ARE = {"PairedFiles": "Compared as the files are", "GeneratedPictures": "Generated images as they are"}
"""What is said instead of how a checkpoint prepares images."""


def print_differences(gone: list[Difference]) -> None:
    """What did not come out again: what it was, and what it is now."""
    table = new_table("figure", "was", "is now", numbers=("was", "is now"))
    for one in gone:
        table.add_row(one.name, str(one.was), str(one.now))
    print_table(table)


def print_figures(results: list[Result]) -> None:
    """A table an evaluator; rows of sets, of several subjects where there are several."""
    rows = [(result.subject["name"], one) for result in results for one in result.measured]
    for number, name in enumerate(dict.fromkeys(one.evaluator for _, one in rows)):
        if number:
            print()
        _print_one(name, [(model, one) for model, one in rows if one.evaluator == name], len(results) > 1)
    prepared = {_prepared(result, one): None for result in results for one in result.measured}
    for line in prepared:
        print(f"\n{line}.")
    _print_notes(rows)


def _prepared(result: Result, one: EvalResult) -> str:
    kind = result.subject.get("kind")
    if kind in AS_THEY_ARE:
        return f"{AS_THEY_ARE[kind]}: {one.preparation}"
    return f"Prepared {'as the checkpoint says' if one.as_shipped else 'NOT as the checkpoint says'}: {one.preparation}"


def _print_notes(rows: list[tuple[str, EvalResult]]) -> None:
    """Each note once, with where it holds."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for name, one in rows:
        for about, note in one.notes.items():
            where.setdefault((one.evaluator, about, note), []).append(f"{name} on {one.data}")
    for (evaluator, about, note), places in where.items():
        some = places[0] if len(places) == 1 else f"{len(places)} measurements"
        say(f"{evaluator}, {about} ({some}): {note}")
    for _, one in rows:
        for key, reason in one.broken[:3]:
            say(f"{one.data}: {key} is in no figure: {reason}")
        if len(one.broken) > 3:
            say(f"{one.data}: {len(one.broken) - 3} more could not be read; the JSON names them")


def _print_one(evaluator: str, rows: list[tuple[str, EvalResult]], several: bool) -> None:
    present = list(dict.fromkeys(name for _, one in rows for name in one.values))
    figures = [name for name in HEADLINES.get(evaluator, present) if name in present]
    if len(figures) > max(MOST, len(rows)):
        _print_turned(evaluator, rows, several, figures)
        return
    columns = [*(["of"] if several else []), evaluator, "set", "n", *figures]
    table = new_table(*columns, numbers=("n", *figures))
    for model, one in rows:
        cells = [_cell(one.values.get(name)) for name in figures]
        table.add_row(*([model] if several else []), one.title, one.data, f"{one.count:,}", *cells)
    print_table(table)


def _print_turned(evaluator: str, rows: list[tuple[str, EvalResult]], several: bool, figures: list[str]) -> None:
    """A line a figure: so many would not fit side by side."""
    table = new_table(evaluator)
    for _, one in rows:
        table.add_column(one.title, justify="right", overflow="fold")
    if several:
        table.add_row("of", *(model for model, _ in rows))
    table.add_row("set", *(one.data for _, one in rows))
    table.add_row("n", *(f"{one.count:,}" for _, one in rows))
    for name in figures:
        table.add_row(name, *(_cell(one.values.get(name)) for _, one in rows))
    print_table(table)


def _cell(figure: MetricValue | None) -> str:
    """With as many digits as the interval, if there is one, can bear."""
    if figure is None:
        return "-"
    if figure.value.is_integer() and abs(figure.value) < 1e6:
        return f"{figure.value:,.0f}{_unit(figure.unit)}"
    digits = 2 if figure.unit in ("dB", "bit") else 1 if figure.unit == "%" or abs(figure.value) >= 100 else 3
    return f"{figure.value:.{digits}f}{_unit(figure.unit)}"


def _unit(unit: str) -> str:
    return "%" if unit == "%" else f" {unit}" if unit else ""
