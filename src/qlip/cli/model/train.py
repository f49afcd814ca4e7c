"""`qlip train`: train a model from a recipe."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from qlip.cli import console
from qlip.cli.console import leave_if_stopped, print_json, show, usage_error
from qlip.cli.options import Json


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe: a packaged one such as nano/stage1, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE...]", help="Changes to the recipe, such as schedule.steps=100 seed=1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the run; default: runs/RECIPE.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete an earlier run in the folder, and start again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe; Ctrl-C saves the state, and the same command continues exactly.

    qlip info RECIPE prints a recipe with all its values. The run's folder holds the resolved recipe, checkpoints, logs,
    images, and at the end the folder model, which --model accepts.
    """
    from qlip import QLIPError, training

    try:
        resolved = training.load_recipe(recipe, overrides or [], console.note)
    except QLIPError as error:
        usage_error(str(error))
    folder = output or Path("runs") / Path(recipe).with_suffix("")
    outcome = training.run(resolved, folder, console.stderr(), restart)
    gc.collect()  # models hold the process group, whose threads can abort the process if they live until Python exits
    if as_json and outcome.first:
        report = {
            "folder": str(folder),
            "finished": outcome.finished,
            "step": outcome.step,
            "model": str(outcome.model),
        }
        print_json(report)
    elif outcome.finished and outcome.first:
        show(f"{outcome.model}: trained for {outcome.step:,} steps; try qlip info {outcome.model}")
    leave_if_stopped(outcome)
