"""From a recipe to a run folder: its kind builds a job, the Trainer runs it, and the task exports the model.

A run folder holds ``recipe.yaml`` (resolved), ``sessions.json`` (versions and git state of each start),
``checkpoints/``, ``log.jsonl``, ``tensorboard/``, what the kind adds (``vocabulary/``, ``pictures/``) and, at the end,
``model/``, a checkpoint to load by path.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlip.errors import QLIPError
from qlip.files import locked, write_text
from qlip.training.job import Job, Kind, find_kind
from qlip.training.log.environment import record_session
from qlip.training.log.mfu import device_peak
from qlip.training.log.runlog import RunLog, SilentLog
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.recipe_diff import first_difference
from qlip.training.recipe_schema import RunRecipe
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.trainer import Trainer

FOLDERS = ("checkpoints", "tensorboard", "wandb", "model")
FILES = ("recipe.yaml", "sessions.json", "log.jsonl")
LOCK = ".lock"
"""File in a run folder, locked by the process that trains there."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: all steps are taken and ``model`` is written.
        step: steps taken.
        model: the exported checkpoint folder; of the last saved checkpoint where the run was stopped.
        stopped_by: the signal that asked to stop, or None.
        first: this is the first rank, which prints.
    """

    finished: bool
    step: int
    model: Path
    stopped_by: Signals | None
    first: bool = True


def run(recipe: RunRecipe, folder: Path, console: Console | None = None, restart: bool = False) -> Outcome:
    """Train a recipe in a folder, resuming from its last checkpoint if it has one; every rank of torchrun calls it.

    Args:
        recipe: checked, from :func:`qlip.training.load_recipe`.
        folder: of the run, seen by all ranks; made if absent.
        console: for progress; standard error by default.
        restart: delete an earlier run in the folder first.

    Raises:
        QLIPError: the folder is another run's or in use, data cannot be read, a loss is not finite, the disk is full.
    """
    kind = find_kind(recipe.task, recipe.name)
    with ExitStack() as held, Parallel(recipe, console) as parallel:

        def claim() -> None:
            busy = f"{folder}: another process trains here; wait for it, or choose another folder"
            held.enter_context(locked(folder / LOCK, busy))
            if restart:
                _clear(folder, kind)
            _claim(recipe, folder)
            record_session(folder)

        parallel.on_rank0(claim)
        return _run(recipe, kind, folder, parallel)


def _run(recipe: RunRecipe, kind: Kind, folder: Path, parallel: Parallel) -> Outcome:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    job = kind.build(recipe, parallel, folder)
    parallel.check_blocks()
    model = job.task.networks["model"]
    ema = EMA(model, recipe.ema.decay) if recipe.ema is not None else None
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, parallel)

    def open_log(step: int) -> RunLog:
        return _open_log(recipe, job, folder, step, parallel)

    trainer = Trainer(job.task, recipe, parallel, checkpoints, job.feed, open_log, ema, job.hooks)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = f"going on from step {trainer.progress.step}" if trainer.progress.step else "starting"
    ranks = f" on {parallel.world} ranks" if parallel.world > 1 else ""
    parallel.say(
        f"{recipe.name}: {start} of {recipe.schedule.steps}, batch {recipe.batch_size}{ranks},"
        f" {parameters / 1e6:.2f} M parameters{', ' * bool(job.describe)}{job.describe}; in {folder}"
    )
    trainer.run()
    finished = trainer.progress.step >= recipe.schedule.steps
    if finished:
        weights = _whole(ema.weights() if ema is not None else model.state_dict(), keep=parallel.first)
        parallel.on_rank0(lambda: job.task.export(folder / "model", weights))
    exported = folder / "model" if finished else checkpoints.latest()
    assert exported is not None
    return Outcome(finished, trainer.progress.step, exported, trainer.stopped_by, parallel.first)


def _open_log(recipe: RunRecipe, job: Job[Any], folder: Path, step: int, parallel: Parallel) -> RunLog:
    if not parallel.first:
        return SilentLog()
    peak = device_peak(parallel.device)
    return RunLog(
        folder,
        step,
        recipe.schedule.steps,
        recipe.log.tensorboard,
        parallel.console,
        wandb=recipe.log.wandb,
        name=recipe.name,
        config=recipe.model_dump(mode="json"),
        unit=job.unit,
        units_per_sample=job.units_per_sample,
        flops=None if peak is None or job.flops_per_sample is None else job.flops_per_sample(),
        peak=None if peak is None else peak * parallel.world,
    )


def _whole(weights: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; all ranks call it, and only those that ``keep`` hold more than one at a time."""
    found = {}
    for name, weight in weights.items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if keep:
            found[name] = whole.detach().cpu()
    return found


def _claim(recipe: RunRecipe, folder: Path) -> None:
    """Store the resolved recipe, or refuse to resume with another one."""
    path = folder / "recipe.yaml"
    if path.exists():
        stored = check_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        changed = first_difference(stored.model_dump(mode="json"), recipe.model_dump(mode="json"), recipe.FREE)
        if changed is not None:
            raise QLIPError(
                f"{folder}: was started with another {changed.key} ({changed.old!r}, now {changed.new!r});"
                " choose another folder, or delete this run"
            )
    write_text(path, recipe.to_yaml())


def _clear(folder: Path, kind: Kind) -> None:
    """Delete what a run wrote."""
    for name in (*FOLDERS, *kind.folders):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
