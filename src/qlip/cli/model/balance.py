"""`qlip recipe balance`: weights of the two objectives by the paper's rule."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import console
from qlip.cli.console import leave_if_stopped, new_table, note, print_json, print_table, say, show, usage_error
from qlip.cli.options import Json

if TYPE_CHECKING:
    from qlip.training.studies.balance_rule import Converged, Rule


def balance(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="Recipe of stage 1: a packaged one such as nano/stage1, or a YAML file."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="Changes to the recipe, in both runs.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for both runs; default: runs/balance/RECIPE."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=16, help="Training steps of each run, enough for its loss to converge.")
    ] = 1000,
    as_json: Json = False,
) -> None:
    """Find the weight of reconstruction relative to alignment, and write the balanced recipe.

    Trains each objective alone for a short run, and sets alpha_r / alpha_a to the ratio of the losses they converge to.
    Ctrl-C saves the state; run the same command to continue. A finished run is not trained again.
    """
    from qlip import QLIPError, training
    from qlip.files import write_text
    from qlip.runtime.ranks import is_first_rank
    from qlip.training.studies import balance_rule

    try:
        resolved = balance_rule.checked(training.load_recipe(recipe, overrides or [], note), recipe)
    except QLIPError as error:
        usage_error(str(error))
    folder = output or Path("runs") / "balance" / Path(recipe).with_suffix("")
    first = is_first_rank()
    for objective in balance_rule.OBJECTIVES:
        outcome = balance_rule.train_alone(resolved, objective, folder, steps, console.stderr())
        if outcome is not None:
            leave_if_stopped(outcome)
        elif first:
            note(f"{folder / objective}: finished already, not trained again")
    if not first:
        return
    rule = balance_rule.read_rule(folder)
    path = folder / "recipe.yaml"
    header = (
        f"# alpha_r by the balance rule, after {steps} steps of each objective alone:"
        f" {rule.alignment.excess:.4g} / {rule.reconstruction.excess:.4g} = {rule.ratio:.4g}\n"
    )
    write_text(path, header + balance_rule.balanced(resolved, rule).to_yaml())
    for one in (rule.alignment, rule.reconstruction):
        if one.still_falling:
            say(
                f"{folder / one.objective}: the loss is still falling (by {one.drift:.2g} in the last quarter,"
                f" spread {one.spread:.2g}); give more --steps and another folder"
            )
    if as_json:
        print_json(_report(rule, path))
    else:
        _print(rule, path, folder)


def _report(rule: Rule, path: Path) -> dict[str, Any]:
    losses = [
        asdict(one) | {"excess": one.excess, "still_falling": one.still_falling}
        for one in (rule.alignment, rule.reconstruction)
    ]
    return {"losses": losses, "ratio": rule.ratio, "alpha_r": rule.alpha_r, "alpha_a": 1.0, "recipe": str(path)}


def _print(rule: Rule, path: Path, folder: Path) -> None:
    numbers = ("loss", "floor", "above floor", "spread", "drift", "lines")
    table = new_table("objective", *numbers, numbers=numbers)
    for one in (rule.alignment, rule.reconstruction):
        table.add_row(one.objective, *_cells(one))
    print_table(table)
    show(
        f"\nalpha_r / alpha_a = {rule.alignment.excess:.4g} / {rule.reconstruction.excess:.4g} = {rule.ratio:.4g}:"
        f" alpha_r {rule.alpha_r:g}, alpha_a 1\n{path}: try qlip train {path} -o {folder / 'balanced'}"
    )


def _cells(one: Converged) -> list[str]:
    return [*(f"{value:.4g}" for value in (one.loss, one.floor, one.excess, one.spread, one.drift)), str(one.lines)]
