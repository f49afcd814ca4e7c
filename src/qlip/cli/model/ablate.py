"""`qlip recipe ablate`: an ablation of many training runs, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli import console
from qlip.cli.console import (
    leave_if_stopped,
    new_table,
    note,
    print_json,
    print_table,
    say,
    show,
    stoppable,
    usage_error,
)
from qlip.cli.options import Json, split_list


def ablate(
    study: Annotated[
        str, typer.Argument(metavar="ABLATION", help="Packaged ablation such as both-objectives, or a YAML file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the runs and the table; default: runs/ABLATION."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="VARIANT",
            help="Train and measure only this variant. May be repeated or separated by commas.",
        ),
    ] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Train nothing: measure finished runs and write the table.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train all variants and seeds of an ablation, measure them, and write its table.

    Finished runs are not trained again, measured models are not measured again, and table.md is written after each
    run. The command may be stopped with Ctrl-C at any time; run it again to continue.
    """
    from qlip.errors import QLIPError
    from qlip.runtime.ranks import is_first_rank
    from qlip.training.studies.ablation import Ablation, load_study
    from qlip.training.studies.ablation_table import cells, columns, make_table, write_table

    folder = output or Path("runs") / Path(study).with_suffix("").name
    first = is_first_rank()
    try:
        ablation = Ablation(load_study(study), folder, note if first else lambda line: None)
        runs = ablation.runs(split_list(only))
    except QLIPError as error:
        usage_error(str(error))
    if first and (missing := ablation.left_out()):
        say(missing)
    for one in runs:
        if not table_only:
            outcome = ablation.train(one, console.stderr())
            if outcome is not None:
                leave_if_stopped(outcome)
        if first and ablation.is_finished(one):
            with stoppable("finished measurements are kept; run the same command to continue"):
                ablation.measure(one)
                write_table(make_table(ablation), folder)
    if not first:
        return
    table = make_table(ablation)
    _, text = write_table(table, folder)
    if as_json:
        print_json({"folder": str(folder)} | table)
        return
    headings = [table["title"], "seeds", *(heading for _, heading, _ in columns(table))]
    shown = new_table(*headings, numbers=tuple(headings[1:]))
    for row in cells(table):
        shown.add_row(*row)
    print_table(shown)
    show(f"\n{text}: mean over seeds (minimum to maximum)")
