"""Trainings of a fixed number of CPU seconds, with a curve of held-out measurements, and their resumable results.

`trained` trains by a recipe at its rates until the CPU time is spent; a `Curve` measures on the way, and the time of
measuring does not count. One process with one thread, so that CPU seconds mean the same on a machine that has other
work. Each finished piece of a study is a line of `Results`, and is skipped when the command runs again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from qlip import recipes
from qlip.files import write_text
from qlip.training.job import Job, Kind, find_kind
from qlip.training.log.eval_context import evaluating
from qlip.training.log.runlog import RunLog
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import apply_override, check_recipe
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.trainer import Trainer

POINTS = 12
"""Points of a curve, at CPU times that grow by the square root of two."""
Measure = Callable[[], Sequence[float]]
"""Held-out measurement of the model that trains, in eval mode."""


def load(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Values of a packaged recipe, or of its file, changed by ``key=value``, as ``qlip train`` takes them."""
    path = recipes.path(name) or Path(name)
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for one in overrides:
        apply_override(values, one)
    return values


def constant(values: dict[str, Any], seed: int) -> dict[str, Any]:
    """Values of a recipe at rates that stay constant after the warm-up, in one process with one thread.

    Args:
        values: of the recipe, of a task that has ``data.num_workers``; they change.
        seed: of the run.
    """
    values.pop("validation", None)
    values["data"] |= {"num_workers": 0}
    values["schedule"] |= {"steps": 10**9, "floor": 1.0}
    return values | {
        "seed": seed,
        "threads": 1,
        "ema": {"decay": 0.99},
        "checkpoint": {"every": 10**9},
        "log": {"every": 200, "tensorboard": False},
    }


class Results:
    """Lines of ``results.jsonl``; a line is added once it is complete.

    Args:
        path: of the file.
        key: columns that tell lines apart.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, key
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def has(self, **key: Any) -> bool:
        """Return whether there is a row of a key."""
        return any(self._of(row, key) for row in self.rows)

    def row(self, **key: Any) -> dict[str, Any]:
        """Return the row of a key that there is one of."""
        return next(row for row in self.rows if self._of(row, key))

    def _of(self, row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
        return all(row.get(name) == key.get(name) for name in self.key)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; the file is whole at all times."""
        self.rows.append(row)
        write_text(self.path, "".join(json.dumps(one) + "\n" for one in self.rows))


class Spent(Exception):
    """Ends a training: its CPU time is spent."""


class Curve:
    """Hook that measures at growing CPU times, and ends the training at the last.

    Args:
        model: that trains.
        measure: what is measured.
        batch_size: samples per step.
        seconds: CPU time of the training; the time of measuring does not count.
        points: number of measurements.

    Attributes:
        points: CPU seconds, samples, and the values measured.
    """

    def __init__(
        self, model: nn.Module, measure: Measure, batch_size: int, seconds: float, points: int = POINTS
    ) -> None:
        self.model, self.measure, self.batch_size = model, measure, batch_size
        self.device = next(model.parameters()).device
        self.marks = [seconds * 2 ** (-number / 2) for number in range(points)]
        self.points: list[tuple[float, ...]] = []
        self.start = time.process_time()

    def __call__(self, step: int, log: RunLog, applied: Callable[[], AbstractContextManager[None]]) -> None:
        spent = time.process_time() - self.start
        if spent < self.marks[-1]:
            return
        with evaluating(self.device, log.clock, applied, self.model):
            values = self.measure()
        self.points.append((spent, step * self.batch_size, *values))
        self.marks = [mark for mark in self.marks if mark > spent]
        if not self.marks:
            raise Spent
        self.start = time.process_time() - spent


@dataclass
class Trained:
    """A finished training.

    Attributes:
        job: task and feed.
        curve: of the training.
        ema: averaged weights, if the recipe has them.
    """

    job: Job[Any]
    curve: Curve
    ema: EMA | None

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters, before anything packs it."""
        return sum(one.numel() for one in self.job.task.networks["model"].parameters())

    def applied(self) -> AbstractContextManager[None]:
        """Context in which the model has the averaged weights."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def export(self, folder: Path) -> None:
        """Write the model's folder, outside of `applied`."""
        network = self.job.task.networks["model"]
        weights: Mapping[str, Tensor] = network.state_dict() if self.ema is None else self.ema.weights()
        self.job.task.export(folder, weights)


@contextmanager
def trained(
    values: dict[str, Any],
    seconds: float,
    scratch: Path,
    measures: Callable[[Any], tuple[nn.Module, Measure]],
    points: int = POINTS,
    kind: Kind | None = None,
) -> Iterator[Trained]:
    """Train by a recipe, and yield the model.

    Args:
        values: of the recipe.
        seconds: CPU time.
        scratch: folder of the run, removed at the end.
        measures: from the task to its model and what the curve measures.
        points: of the curve.
        kind: of the training; by default the one that the recipe's task names.
    """
    recipe = check_recipe(values, values["name"])
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed training
    torch.manual_seed(recipe.seed)
    with Parallel(recipe, Console(stderr=True)) as parallel:
        job = (kind or find_kind(recipe.task, recipe.name)).build(recipe, parallel, scratch)
        curve = Curve(*measures(job.task), recipe.batch_size, seconds, points)
        ema = None if recipe.ema is None else EMA(job.task.networks["model"], recipe.ema.decay)
        checkpoints = Checkpoints(scratch / "checkpoints", recipe.checkpoint, parallel)
        open_log = partial(job.open_log, recipe, parallel, scratch)
        trainer = Trainer(job.task, recipe, parallel, checkpoints, job.feed, open_log, ema, [curve])
        try:
            trainer.run()
        except Spent:
            yield Trained(job, curve, ema)
        else:  # by a signal
            raise SystemExit("stopped; this training starts again with the same command")
    shutil.rmtree(scratch)
