"""`qlip recipe probe`: gradients of the losses during a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip.cli import console
from qlip.cli.console import leave_if_stopped, new_table, note, print_json, print_table, show, usage_error
from qlip.cli.options import Json


def probe(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="Recipe to train, or folder of a run that logged gradients.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="Changes to the recipe.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the results; default: the run's folder, or runs/gradients/RECIPE.",
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Training steps per measurement of the gradients, if a recipe is trained.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Plot the gradient of each loss at the encoder during training, and the cosines between them.

    Writes gradients.jsonl and gradients.png: the norm of each loss's unweighted gradient at the encoder's last shared
    layer, and the cosine of each pair. A recipe is trained first, or its training continued; a run's folder is read.
    """
    from qlip import training
    from qlip.errors import QLIPError, require
    from qlip.training.run_folder import is_finished
    from qlip.training.studies import gradient_norms

    require("matplotlib.figure", extra="train")  # for the plot, after the training
    run = Path(source)
    if (run / "log.jsonl").is_file():
        if overrides:
            usage_error(f"{source}: is a finished run; {overrides[0]} can only change a recipe")
        output = output or run
    else:
        try:
            recipe = gradient_norms.probing(training.load_recipe(source, overrides or [], note), every)
        except QLIPError as error:
            usage_error(str(error))
        output = run = output or Path("runs") / "gradients" / run.with_suffix("")
        if recipe.log.every < every:
            steps = recipe.schedule.steps
            note(f"{recipe.name}: has {steps} steps, fewer than --every {every}; measuring every {recipe.log.every}")
        if not is_finished(recipe, run):
            outcome = training.run(recipe, run, console.stderr())
            leave_if_stopped(outcome)
            if not outcome.first:
                return
    lines = gradient_norms.read_gradients(run)
    title = f"Gradients at the encoder's last shared layer: {source}"
    numbers, plot = gradient_norms.write_gradients(lines, output, title)
    if as_json:
        print_json({"run": str(run), "lines": str(numbers), "image": str(plot), "last": lines[-1]})
        return
    table = new_table("at step", "first", "last", numbers=("first", "last"))
    first, last = lines[0], lines[-1]
    table.add_row("", f"{first['step']:.0f}", f"{last['step']:.0f}")
    for name in last:
        if name != "step":
            table.add_row(name.replace("/", " "), f"{first.get(name, float('nan')):.3g}", f"{last[name]:.3g}")
    print_table(table)
    show(f"\n{plot}: the plot; {numbers}: its {len(lines)} points")
