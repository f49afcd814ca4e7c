"""The paper's rule for the two loss weights of stage 1: train each objective alone, then equalise both losses.

alpha_r / alpha_a = L_align / L_mse, the losses that each objective converges to when the other has weight 0
(arXiv 2502.05178, section 3.2). If pairs with equal captions share their target, the alignment loss cannot fall below
the entropy of the targets; the rule then uses the difference from this floor.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qlip.errors import QLIPError
from qlip.training.recipe import changed
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run import Outcome, run
from qlip.training.run_folder import is_finished, read_log
from qlip.training.tasks.recipe import Stage1Recipe

Objective = Literal["alignment", "reconstruction"]
OBJECTIVES: tuple[Objective, ...] = ("alignment", "reconstruction")
TERMS = {"alignment": "align", "reconstruction": "mse"}

LINES = 40
"""Minimum number of log lines per run, so that a spread can be computed over its last quarter."""


@dataclass(frozen=True)
class Converged:
    """Converged loss of one objective: statistics over the last quarter of a run that trained it alone.

    Attributes:
        objective: the trained objective.
        loss: mean over the log lines, which are themselves means over steps.
        floor: mean lower bound of the loss; 0 for a pixel error.
        spread: standard deviation over the lines of the loss above its floor.
        drift: mean of the quarter's first half minus mean of its second half.
        lines: number of log lines in the quarter.
    """

    objective: Objective
    loss: float
    floor: float
    spread: float
    drift: float
    lines: int

    @property
    def excess(self) -> float:
        """Loss above its floor, which the rule uses."""
        return self.loss - self.floor

    @property
    def still_falling(self) -> bool:
        """True if the loss fell by more than its spread."""
        return self.drift > self.spread


@dataclass(frozen=True)
class Rule:
    """Converged losses of both objectives, and the resulting weight for alpha_a = 1."""

    alignment: Converged
    reconstruction: Converged

    @property
    def ratio(self) -> float:
        """Ratio alpha_r / alpha_a."""
        return self.alignment.excess / self.reconstruction.excess

    @property
    def alpha_r(self) -> float:
        """Ratio rounded to two significant digits, because the losses vary by more than that."""
        return float(f"{self.ratio:.2g}")


def checked(recipe: RunRecipe, where: str) -> Stage1Recipe:
    """Return the recipe if the rule applies to it.

    Raises:
        QLIPError: the recipe is of stage 2, or sets its weights automatically.
    """
    if not isinstance(recipe, Stage1Recipe):
        raise QLIPError(
            f"{where}: the rule is for the two objectives of stage 1, and this is stage 2; give a recipe of stage 1"
        )
    if recipe.losses.balance != "fixed":
        raise QLIPError(
            f"{where}: losses.balance={recipe.losses.balance} sets weights automatically; set losses.balance=fixed"
        )
    return recipe


def alone(recipe: Stage1Recipe, objective: Objective, steps: int) -> Stage1Recipe:
    """Return the recipe with a single objective and its own schedule of ``steps`` steps; quantisation losses stay."""
    losses, log = recipe.losses, recipe.log
    values: dict[str, Any] = {
        "name": f"{recipe.name}-{objective}",
        "schedule.steps": steps,
        "schedule.warmup": min(recipe.schedule.warmup, steps // 4),
        "log": {"every": max(1, min(log.every, steps // LINES)), "images_every": 0, "tensorboard": log.tensorboard},
        "validation": None,
    }
    if objective == "reconstruction":
        values |= {"losses.alpha_r": losses.alpha_r or 1.0, "losses.alpha_a": 0.0}
    else:
        values |= {"losses.alpha_r": 0.0, "losses.alpha_a": losses.alpha_a or 1.0}
    return changed(recipe, values)


def train_alone(
    recipe: Stage1Recipe, objective: Objective, folder: Path, steps: int, console: Console | None = None
) -> Outcome | None:
    """Train one objective in ``folder/<objective>``, resuming an unfinished run.

    Returns:
        Outcome of the run, or None if it had already finished.
    """
    single, place = alone(recipe, objective, steps), folder / objective
    return None if is_finished(single, place) else run(single, place, console)


def read_rule(folder: Path) -> Rule:
    """Compute the rule from two finished runs in ``folder``.

    Raises:
        QLIPError: a log has too few lines, or a loss is not above its floor.
    """
    rule = Rule(*(converged(folder / objective, objective) for objective in OBJECTIVES))
    for one in (rule.alignment, rule.reconstruction):
        if not one.excess > 0:
            raise QLIPError(
                f"{folder / one.objective}: its loss {one.loss:.4g} is not above its floor {one.floor:.4g},"
                " so the weight is undefined; train on more pairs with different captions"
            )
    return rule


def converged(folder: Path, objective: Objective) -> Converged:
    """Compute statistics of an objective's loss over the last quarter of the steps in ``folder/log.jsonl``.

    Raises:
        QLIPError: there is no log, it lacks the loss, or the quarter has fewer than four lines.
    """
    term, path = TERMS[objective], folder / "log.jsonl"
    lines = read_log(folder, f"delete {folder} and train it again")
    last = [line for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
    found = [(line[term], line.get(f"{term}_floor", 0.0)) for line in last if term in line]
    if lines and not found:
        raise QLIPError(f"{path}: its last lines have no {term}; {objective} needs data with {_needs(objective)}")
    if len(found) < 4:
        raise QLIPError(f"{path}: {len(found)} lines in its last quarter, at least 4 are needed; train for more steps")
    above = [loss - floor for loss, floor in found]
    half = len(above) // 2
    return Converged(
        objective,
        statistics.fmean(loss for loss, _ in found),
        statistics.fmean(floor for _, floor in found),
        statistics.stdev(above),
        statistics.fmean(above[:half]) - statistics.fmean(above[-half:]),
        len(above),
    )


def _needs(objective: Objective) -> str:
    return "captions" if objective == "alignment" else "images"


def balanced(recipe: Stage1Recipe, rule: Rule) -> Stage1Recipe:
    """Return the recipe with the rule's weights (alpha_a is 1) and otherwise unchanged."""
    return changed(recipe, {"losses.alpha_r": rule.alpha_r, "losses.alpha_a": 1.0})
