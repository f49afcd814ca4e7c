"""`qlip recipe probe`: gradients of the losses during a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli.console import leave_if_stopped, new_table, note, print_json, print_table, usage_error
from qlip.cli.options import Json


def probe(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe to train, or the folder of a run that looked at them.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="What to change in the recipe.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder; the run's own, or runs/gradients/RECIPE."),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks, where a recipe is trained.")] = 10,
    as_json: Json = False,
) -> None:
    """Draw how strongly each loss pulls at the encoder along training, and whether they pull together.

    Writes gradients.jsonl and gradients.png: norms of each loss's gradient, without its weight, at the encoder's last
    shared layer, and the cosines between them. A recipe is trained first, or gone on with; a run's folder is read.
    """
    from qlip import training
    from qlip.errors import QLIPError
    from qlip.training.studies import gradient_norms as gradient_plot
    from qlip.training.studies.finished_runs import is_finished

    run = Path(what)
    if (run / "log.jsonl").is_file():
        if overrides:
            usage_error(f"{what}: is a run that is over; {overrides[0]} changes only a recipe")
        output = output or run
    else:
        try:
            recipe = gradient_plot.probing(training.load_recipe(what, overrides or []), every)
        except QLIPError as error:
            usage_error(str(error))
        output = run = output or Path("runs") / "gradients" / run.with_suffix("")
        if recipe.log.every < every:
            steps = recipe.schedule.steps
            note(f"{recipe.name}: takes {steps} steps, fewer than --every {every}; looking every {recipe.log.every}")
        if not is_finished(recipe, run):
            outcome = training.run(recipe, run)
            leave_if_stopped(outcome)
            if not outcome.first:
                return
    lines = gradient_plot.read_gradients(run)
    title = f"Gradients at the encoder's last shared layer: {what}"
    numbers, picture = gradient_plot.write_gradients(lines, output, title)
    if as_json:
        print_json({"run": str(run), "lines": str(numbers), "picture": str(picture), "last": lines[-1]})
        return
    table = new_table("at step", "first", "last", numbers=("first", "last"))
    first, last = lines[0], lines[-1]
    table.add_row("", f"{first['step']:.0f}", f"{last['step']:.0f}")
    for name in last:
        if name != "step":
            table.add_row(name.replace("/", " "), f"{first.get(name, float('nan')):.3g}", f"{last[name]:.3g}")
    print_table(table)
    print(f"\n{picture}: the figure; {numbers}: its {len(lines)} points")
