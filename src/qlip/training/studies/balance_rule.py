"""The paper's rule for the two weights of stage 1: each objective alone first, then weights that make them equal.

alpha_r / alpha_a = L_align / L_mse, the losses that each objective converges to where the other has no weight
(arXiv 2502.05178, section 3.2). Where pairs of equal meaning share their target, the alignment loss cannot go below the
targets' own entropy; what counts is how far above that floor it is.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from qlip.errors import QLIPError
from qlip.training.recipe import check_recipe
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run import Outcome, run
from qlip.training.studies.finished_runs import is_finished
from qlip.training.tasks.recipe import Stage1Recipe

Objective = Literal["alignment", "reconstruction"]
OBJECTIVES: tuple[Objective, ...] = ("alignment", "reconstruction")
TERMS = {"alignment": "align", "reconstruction": "mse"}

LINES = 40
"""At least so many lines of the log a run, so that its last quarter has a spread."""


@dataclass(frozen=True)
class Converged:
    """A loss over the last quarter of a run that trained it alone.

    Attributes:
        objective: that was trained.
        loss: mean of the log's lines, themselves means over steps.
        floor: mean of the least that the loss can be; 0 for a pixel error.
        spread: standard deviation of the lines, of what is above the floor.
        drift: how much the quarter's first half is above its second.
        lines: in the quarter.
    """

    objective: Objective
    loss: float
    floor: float
    spread: float
    drift: float
    lines: int

    @property
    def excess(self) -> float:
        """What is above the floor; the rule's number."""
        return self.loss - self.floor

    @property
    def still_falling(self) -> bool:
        """Whether it fell by more than it scatters."""
        return self.drift > self.spread


@dataclass(frozen=True)
class Rule:
    """Both losses and the weight that follows, for alpha_a = 1."""

    alignment: Converged
    reconstruction: Converged

    @property
    def ratio(self) -> float:
        """alpha_r / alpha_a."""
        return self.alignment.excess / self.reconstruction.excess

    @property
    def alpha_r(self) -> float:
        """The ratio in two significant digits: the losses scatter by more."""
        return float(f"{self.ratio:.2g}")


def checked(recipe: RunRecipe, where: str) -> Stage1Recipe:
    """The recipe, if the rule applies to it.

    Raises:
        QLIPError: stage 2, or a recipe that finds its weights by itself.
    """
    if not isinstance(recipe, Stage1Recipe):
        raise QLIPError(f"{where}: the rule weighs stage 1's two objectives, and this is stage 2; give its stage 1")
    if recipe.losses.balance != "fixed":
        raise QLIPError(
            f"{where}: losses.balance={recipe.losses.balance} finds weights by itself; set losses.balance=fixed"
        )
    return recipe


def alone(recipe: Stage1Recipe, objective: Objective, steps: int) -> Stage1Recipe:
    """The recipe with one objective, over so many steps with a cosine of their own; quantisation stays."""
    values = recipe.model_dump(mode="json")
    losses = recipe.losses
    weights = {"alignment": (0.0, losses.alpha_a or 1.0), "reconstruction": (losses.alpha_r or 1.0, 0.0)}
    values["losses"] |= dict(zip(("alpha_r", "alpha_a"), weights[objective], strict=True))
    values["name"] = f"{recipe.name}-{objective}"
    values["schedule"] |= {"steps": steps, "warmup": min(recipe.schedule.warmup, steps // 4)}
    values["log"] |= {"every": max(1, min(recipe.log.every, steps // LINES))}
    values["log"] |= {"images_every": 0, "gradients_every": 0, "wandb": None}
    values["validation"] = None
    found = check_recipe(values, recipe.name)
    assert isinstance(found, Stage1Recipe)
    return found


def train_alone(
    recipe: Stage1Recipe, objective: Objective, folder: Path, steps: int, console: Console | None = None
) -> Outcome | None:
    """Train one objective in ``folder/<objective>``, going on where an earlier run stopped.

    Returns:
        How the run ended, or None where it had been finished before.
    """
    single, place = alone(recipe, objective, steps), folder / objective
    return None if is_finished(single, place) else run(single, place, console)


def read_rule(folder: Path) -> Rule:
    """The rule from two finished runs in ``folder``.

    Raises:
        QLIPError: a log has too few lines, or a loss that is not above its floor.
    """
    rule = Rule(*(converged(folder / objective, objective) for objective in OBJECTIVES))
    for one in (rule.alignment, rule.reconstruction):
        if not one.excess > 0:
            raise QLIPError(
                f"{folder / one.objective}: its loss {one.loss:.4g} is not above its floor {one.floor:.4g},"
                " so no weight follows; give the recipe more pairs of different meaning"
            )
    return rule


def converged(folder: Path, objective: Objective) -> Converged:
    """A loss over the last quarter of the steps in ``folder/log.jsonl``.

    Raises:
        QLIPError: no log, no such loss in it, or fewer than two lines a half.
    """
    term, path = TERMS[objective], folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: cannot be read ({error}); delete {folder} and run it again") from None
    last = [line for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
    found = [(line[term], line.get(f"{term}_floor", 0.0)) for line in last if term in line]
    if lines and not found:
        raise QLIPError(f"{path}: its last lines have no {term}; {objective} needs data with {_needs(objective)}")
    if len(found) < 4:
        raise QLIPError(f"{path}: {len(found)} lines in its last quarter, 4 are needed; give more --steps")
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
    return "words" if objective == "alignment" else "pictures"


def balanced(recipe: Stage1Recipe, rule: Rule) -> Stage1Recipe:
    """The recipe with the rule's weights: alpha_a is 1, all else stays."""
    values = recipe.model_dump(mode="json")
    values["losses"] |= {"alpha_r": rule.alpha_r, "alpha_a": 1.0}
    found = check_recipe(values, recipe.name)
    assert isinstance(found, Stage1Recipe)
    return found
