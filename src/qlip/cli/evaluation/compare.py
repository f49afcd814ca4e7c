"""`qlip compare`: compare evaluation results in tables, plots and an HTML page."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli.console import note, show
from qlip.cli.options import split_list
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.evaluation.report.compare import Comparison


class Format(StrEnum):
    """Formats of the tables on stdout."""

    markdown = "markdown"
    latex = "latex"
    html = "html"


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT...", help="Results: folders that qlip eval -o wrote, or their result.json."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for comparison.html, tables and plots."),
    ] = None,
    format: Annotated[Format, typer.Option(help="Format of the tables on stdout.")] = Format.markdown,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Metric to show, such as psnr; default: all. May be repeated or separated by commas.",
        ),
    ] = None,
    intervals: Annotated[bool, typer.Option(help="Show 95% confidence intervals.")] = False,
    codecs: Annotated[bool, typer.Option(help="Also show the image codecs that qlip eval --codecs measured.")] = False,
    mixed: Annotated[
        bool, typer.Option(help="Also compare models with different image preparation; each is labelled with its own.")
    ] = False,
) -> None:
    """Compare evaluation results; metrics are compared only if images, settings and count are equal."""
    from qlip.evaluation.report import html, table
    from qlip.evaluation.report.bundle import read_bundle
    from qlip.evaluation.report.compare import PreparationError
    from qlip.evaluation.report.compare import compare as compare_results
    from qlip.files import write_text

    if output is not None:
        html.require_packages()
    metrics = split_list(metric)
    paths = [path for result in results for path in (result, *(_codecs(result) if codecs else ()))]
    bundles = [read_bundle(path) for path in paths]
    try:
        comparisons = compare_results(bundles, mixed=mixed, only=metrics)
    except PreparationError as error:
        raise QLIPError(f"{error} (--mixed)") from None
    tables = [one.table(intervals) for one in comparisons]
    show(table.write(tables, format.value))
    if output is None:
        return
    drawn = compare_results(bundles, mixed=mixed) if metrics else comparisons  # a plot has a second metric
    plots = _plots(drawn, output, metrics)
    write_text(output / "tables.md", table.write(tables, "markdown") + "\n")
    write_text(output / "tables.tex", table.write(tables, "latex") + "\n")
    page = html.write_comparison(output / "comparison.html", bundles, comparisons, plots=plots, only=metrics)
    note(f"{page}: open it in a browser")


def _codecs(folder: Path) -> list[Path]:
    """Results of image codecs in the folder of a model's result."""
    return sorted(path for path in (folder / "codecs").glob("*") if path.is_dir())


def _plots(tables: list[Comparison], output: Path, only: list[str]) -> dict[str, Path]:
    """Write the plots whose metrics the results have; with ``only``, those that show one of these."""
    from qlip.evaluation.report import plots
    from qlip.evaluation.report.table import titled

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in only if name in names), None)

    rebuilt = first(("psnr", "ssim", "ms_ssim", "l1", "lpips_vgg", "lpips_alex"))
    fidelity, meaning = first(plots.FIDELITY), first(plots.MEANING)
    metric = rebuilt or "psnr"
    rate = partial(plots.rate_distortion, tables, metric=metric)
    both = partial(plots.meaning_against_fidelity, tables, fidelity=fidelity, meaning=meaning)
    found: dict[str, Path] = {}
    for title, name, draw, shows in (
        (f"Bits per pixel against {titled(metric)}", "rate-distortion.png", rate, rebuilt),
        ("Meaning against fidelity", "meaning.png", both, fidelity or meaning),
    ):
        if only and not shows:
            continue
        try:
            draw(path=output / name)
        except QLIPError as error:
            note(str(error))
        else:
            found[title] = output / name
    return found
