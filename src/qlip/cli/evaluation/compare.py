"""`qlip compare`: several results side by side, as tables, plots and a page."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli.console import note, say

if TYPE_CHECKING:
    from qlip.evaluation.report.result import Result


class Format(StrEnum):
    """Of tables on stdout."""

    markdown = "markdown"
    latex = "latex"
    html = "html"


HELP_RESULTS = "Folders that qlip eval -o wrote, or their result.json; a folder's codecs come along with --codecs."


def compare(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help=HELP_RESULTS)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write comparison.html, tables and plots there."),
    ] = None,
    format: Annotated[Format, typer.Option(help="Of the tables on stdout.")] = Format.markdown,
    figure: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this figure, on the page too, e.g. psnr; may be given again."),
    ] = None,
    intervals: Annotated[bool, typer.Option(help="With 95% intervals.")] = False,
    codecs: Annotated[bool, typer.Option(help="With the codecs that qlip eval --codecs measured beside.")] = False,
    mixed: Annotated[
        bool, typer.Option(help="Also models whose images were prepared differently; each then says its own.")
    ] = False,
) -> None:
    """Put results side by side; a figure stands only beside figures of the very same images, settings and count."""
    from qlip.evaluation.report import html as report
    from qlip.evaluation.report import tables
    from qlip.evaluation.report.bundle import read_bundle
    from qlip.evaluation.report.compare import compare as side_by_side
    from qlip.files import write_text

    paths = [path for given in results for path in (given, *(_codecs(given) if codecs else ()))]
    bundles = [read_bundle(path) for path in paths]
    found = side_by_side([one.result for one in bundles], mixed=mixed)
    if figure:
        found = tables.chosen(found, figure)
    print(tables.write(found, format.value, intervals=intervals))
    if output is None:
        return
    plots = _plots([one.result for one in bundles], output, mixed, figure or [])
    write_text(output / "tables.md", tables.write(found, "markdown", intervals=intervals) + "\n")
    write_text(output / "tables.tex", tables.write(found, "latex", intervals=intervals) + "\n")
    page = report.write_comparison(output / "comparison.html", bundles, mixed=mixed, plots=plots, only=figure or ())
    note(f"{page}: open it in a browser")


def _codecs(folder: Path) -> list[Path]:
    """What was measured beside a model."""
    return sorted(path for path in (folder / "codecs").glob("*") if path.is_dir())


def _plots(results: list[Result], output: Path, mixed: bool, only: list[str]) -> dict[str, Path]:
    """Those that the results have figures for; of some figures alone, those that show one of them."""
    from qlip.errors import QLIPError
    from qlip.evaluation.report import plots
    from qlip.evaluation.report.compare import titled

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in only if name in names), None)

    rebuilt = first(("psnr", "ssim", "ms_ssim", "l1", "lpips_vgg", "lpips_alex"))
    fidelity, meaning = first(plots.FIDELITY), first(plots.MEANING)
    metric = rebuilt or "psnr"
    rate = partial(plots.rate_distortion, results, metric=metric, mixed=mixed)
    both = partial(plots.meaning_against_fidelity, results, fidelity=fidelity, meaning=meaning, mixed=mixed)
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
            say(f"{name} is left out: {error}")
        else:
            found[title] = output / name
    return found
