"""`qlip recipe ablate`: a study of many runs, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli.console import leave_if_stopped, new_table, print_json, print_table, say, stoppable, usage_error
from qlip.cli.options import Json


def ablate(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A packaged study such as both-objectives, or a YAML file.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The study's folder; runs/STUDY by default.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="VARIANT", help="Only this variant; may be given again.")
    ] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Train nothing: measure what is finished, and write the table.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train all variants and seeds of a study, measure them, and fill its table, over as many days as it takes.

    Runs that are finished are not trained again, models that were measured are not measured again, and table.md is
    written after each: stop it with Ctrl-C whenever you like, the same command goes on.
    """
    from qlip.errors import QLIPError
    from qlip.runtime.ranks import is_first_rank
    from qlip.training.studies.ablation import Ablation, load_study
    from qlip.training.studies.ablation_table import cells, columns, make_table, write_table

    folder = output or Path("runs") / Path(study).with_suffix("").name
    first = is_first_rank()
    try:
        ablation = Ablation(load_study(study), folder, say if first else lambda line: None)
        runs = ablation.runs(only or ())
    except QLIPError as error:
        usage_error(str(error))
    if first and (missing := ablation.left_out()):
        say(missing)
    for one in runs:
        if not table_only:
            outcome = ablation.train(one)
            if outcome is not None:
                leave_if_stopped(outcome)
        if first and ablation.is_finished(one):
            with stoppable("what was measured is kept; the same command goes on"):
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
    print(f"\n{text}: mean over seeds (least to greatest)")
