"""`qlip train`: a run from a recipe."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from qlip.cli import console
from qlip.cli.console import leave_if_stopped, print_json, usage_error
from qlip.cli.options import Json


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A packaged recipe such as nano/stage1, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE...]", help="What to change in it, e.g. schedule.steps=100 seed=1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The run's folder; runs/RECIPE by default.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what is in the folder of an earlier run, and start anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe; Ctrl-C saves, and the same command goes on, exactly.

    qlip info RECIPE prints a recipe with every value spelled out. The folder gets the resolved recipe, checkpoints,
    logs, images, and at the end the folder model, which --model takes.
    """
    from qlip import QLIPError, training

    try:
        resolved = training.load_recipe(recipe, overrides or [])
    except QLIPError as error:
        usage_error(str(error))
    folder = output or Path("runs") / Path(recipe).with_suffix("")
    outcome = training.run(resolved, folder, console.stderr(), restart)
    gc.collect()  # models hold the ranks' group, whose threads can abort the process if they live while Python ends
    if as_json and outcome.first:
        report = {
            "folder": str(folder),
            "finished": outcome.finished,
            "step": outcome.step,
            "model": str(outcome.model),
        }
        print_json(report)
    elif outcome.finished and outcome.first:
        print(f"{outcome.model}: trained for {outcome.step:,} steps; try qlip info {outcome.model}")
    leave_if_stopped(outcome)
