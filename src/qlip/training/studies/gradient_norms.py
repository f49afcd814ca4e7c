"""Gradient of each loss at the encoder's last shared layer during training: norms and angles, from a run's log.

The paper weights both objectives (arXiv 2502.05178, section 3.2) because at the last linear layer of the encoder's last
MLP, the gradient of the contrastive loss is orders of magnitude larger than that of the pixel error. A run logs the
gradients of the weighted terms; this module divides the weights out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

from qlip.errors import QLIPError
from qlip.evaluation.report import drawing
from qlip.files import write_bytes, write_text
from qlip.training.job import find_kind
from qlip.training.recipe import changed
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run_folder import read_log, stored_recipe
from qlip.training.tasks.recipe import Stage1Recipe
from qlip.training.tasks.recipe_schema import Stage1Losses

Line = dict[str, float]
"""One log line: ``step``, ``norm/<loss>`` and ``cosine/<a>/<b>`` to their values."""

TITLES = {"mse": "pixel error", "align": "alignment", "bsq": "quantisation", "commitment": "commitment"}
COLOURS = dict(zip(TITLES, drawing.COLOURS, strict=False))
REMEDY = "give a run's folder"
MIN_PROBES = 4
"""Gradient probes of a run shorter than the probe interval."""
PAIR_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#999999", "#cc79a7", "#009e73")
"""Colours of the lower plot, different from those of the losses as far as possible."""


def probing(recipe: RunRecipe, every: int) -> Stage1Recipe:
    """Return the recipe with a log line and a gradient probe every ``every`` steps.

    A run of fewer steps is probed `MIN_PROBES` times instead, or at each step if it has fewer steps than that.

    Raises:
        QLIPError: the recipe is of stage 2, whose encoder is frozen.
    """
    if not isinstance(recipe, Stage1Recipe):
        raise QLIPError(f"{recipe.name}: stage 2's encoder is frozen and has no gradients; give stage 1")
    if every > recipe.schedule.steps:
        every = max(1, recipe.schedule.steps // MIN_PROBES)
    return changed(recipe, {"log.every": every, "log.gradients_every": every})


def read_gradients(folder: Path) -> list[Line]:
    """Read the log lines of a run that hold gradients, and divide out the loss weights.

    If weights are recomputed at each step (``losses.balance``), each line's mean factor is divided out as well.

    Args:
        folder: folder of the run.

    Returns:
        Lines in the order of steps, with losses in the order of the log.

    Raises:
        QLIPError: not a run of stage 1, or its log holds no gradients.
    """
    weights = _weights(folder)
    logged = read_log(folder, REMEDY)
    lines = [_unweighted(line, weights) for line in logged if any(name.startswith("norm/") for name in line)]
    if not lines:
        raise QLIPError(f"{folder}: its log holds no gradients; train with log.gradients_every=50, or probe its recipe")
    return lines


def _weights(folder: Path) -> dict[str, float]:
    stored = stored_recipe(folder, REMEDY)
    if not issubclass(find_kind(stored["task"], str(folder / "recipe.yaml")).Recipe, Stage1Recipe):
        raise QLIPError(f"{folder}: stage 2's encoder is frozen and has no gradients; give a run of stage 1")
    losses = Stage1Losses.model_construct(**stored.get("losses", {}))  # not validated, so that old runs still count
    return {"mse": losses.alpha_r, "bsq": losses.alpha_q, "align": losses.alpha_a, "commitment": losses.commitment}


def _unweighted(line: Mapping[str, float], weights: Mapping[str, float]) -> Line:
    found: Line = {"step": line["step"]}
    for name, value in line.items():
        kind, _, loss = name.partition("/")
        if kind == "norm":
            found[name] = value / (weights.get(loss, 1.0) * line.get(f"factor/{loss}", 1.0))
        elif kind == "cosine":
            found[name] = value  # positive weights do not change angles
    return found


def write_gradients(lines: Sequence[Line], folder: Path, title: str) -> tuple[Path, Path]:
    """Write ``gradients.jsonl`` and ``gradients.png``; returns their paths."""
    numbers, image = folder / "gradients.jsonl", folder / "gradients.png"
    write_text(numbers, "".join(json.dumps(line) + "\n" for line in lines))
    write_bytes(image, plot(lines, title))
    return numbers, image


def plot(lines: Sequence[Line], title: str) -> bytes:
    """Plot norms over steps on a logarithmic scale, and below them the cosines of all pairs; returns PNG bytes."""
    figure = drawing.new_figure(8, 6.4, extra="train")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    losses = list(
        dict.fromkeys(name.removeprefix("norm/") for line in lines for name in line if name.startswith("norm/"))
    )
    for loss in losses:
        _draw(above, lines, f"norm/{loss}", TITLES.get(loss, loss), COLOURS.get(loss, drawing.GREY))
    above.set_yscale("log")
    above.set_ylabel("norm of the loss's gradient\n(without its weight)")
    above.set_title(title, loc="left", fontsize=11)
    pairs = [pair for pair in combinations(losses, 2) if any("cosine/{}/{}".format(*pair) in line for line in lines)]
    for pair, colour in zip(pairs, cycle(PAIR_COLOURS), strict=False):
        label = " and ".join(TITLES.get(loss, loss) for loss in pair)
        _draw(below, lines, "cosine/{}/{}".format(*pair), label, colour)
    below.axhline(0, color=drawing.GREY, linewidth=0.8)
    below.set_ylim(-1.05, 1.05)
    below.set_ylabel("cosine of the angle\nbetween gradients")
    below.set_xlabel("step")
    for axes in (above, below):
        drawing.add_grid(axes)
        if axes.get_lines() and axes.get_legend_handles_labels()[0]:
            drawing.add_legend_beside(axes)
    return drawing.png(figure)


def _draw(axes: Any, lines: Sequence[Line], name: str, label: str, colour: str) -> None:
    """Draw a value over steps, with markers if there are few points; norms of 0 have no place on a logarithmic axis."""
    points = [(line["step"], line[name]) for line in lines if name in line and (line[name] > 0 or "norm" not in name)]
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=colour, marker="o" if len(points) <= 60 else None, markersize=3, label=label)
