"""`qlip train`: a run from a recipe."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli.console import leave_if_stopped, print_json, usage_error
from qlip.cli.options import Json

if TYPE_CHECKING:
    from qlip.training.recipe import AnyRecipe


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
    only_tell: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell what it would take and read: parameters, memory, samples, rates, data."),
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: on so many ranks; torchrun's number by default.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="GIB", help="With --dry-run: what a rank's device has; this machine's by default."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe; Ctrl-C saves, and the same command goes on, exactly.

    qlip info RECIPE prints a recipe with every value spelled out. The folder gets the resolved recipe, checkpoints,
    logs, images, and at the end the folder model, which --model takes.
    """
    from qlip import QLIPError, training
    from qlip.training.log.environment import world_size

    try:
        resolved = training.load_recipe(recipe, overrides or [])
    except QLIPError as error:
        usage_error(str(error))
    if only_tell:
        _tell(resolved, world or world_size(), memory, as_json)
        return
    if world is not None or memory is not None:
        usage_error("--world and --memory go with --dry-run; torchrun starts several ranks")
    folder = output or Path("runs") / Path(recipe).with_suffix("")
    outcome = training.run(resolved, folder, restart=restart)
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


def _tell(recipe: AnyRecipe, world: int, memory: float | None, as_json: bool) -> None:
    from qlip.cli.model.dryrun import as_report, show
    from qlip.training.dryrun import dry_run

    found = dry_run(recipe, world, memory)
    if as_json:
        print_json(as_report(found))
    else:
        show(found)
