"""From a recipe to a run folder: its kind builds a job, the Trainer runs it, and the task exports the model.

A run folder holds ``recipe.yaml`` (resolved), ``sessions.json`` (versions and git state of each start),
``checkpoints/``, ``log.jsonl``, ``tensorboard/``, what the kind adds (``vocabulary/``, ``pictures/``) and, at the end,
``model/``, a checkpoint to load by path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from rich.console import Console

from qlip.runtime.machine import multiplies_bfloat16
from qlip.training.job import Job, Kind, find_kind
from qlip.training.log.loggers import require_packages
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.parallelize import whole_tensors
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run_folder import claim, reserved
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.trainer import Trainer


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
        parallel.on_rank0(lambda: require_packages(recipe.log.tensorboard, recipe.log.wandb is not None))
        parallel.on_rank0(lambda: held.enter_context(reserved(folder, recipe, kind, restart)))
        return _run(recipe, kind, folder, parallel)


def _run(recipe: RunRecipe, kind: Kind, folder: Path, parallel: Parallel) -> Outcome:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    job = kind.build(recipe, parallel, folder)
    parallel.check_blocks()
    ema = EMA(job.task.networks["model"], recipe.ema.decay) if recipe.ema is not None else None
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, parallel)
    open_log = partial(job.open_log, recipe, parallel, folder)
    trainer = Trainer(job.task, recipe, parallel, checkpoints, job.feed, open_log, ema, job.hooks)
    parallel.say(_first_line(recipe, job, trainer.progress.step, folder, parallel.world))
    for note in [*recipe.notes, *_slow_types(recipe, parallel.device)]:
        parallel.say(note)
    trainer.run(on_first_batch=lambda: claim(folder, recipe))
    finished = trainer.progress.step >= recipe.schedule.steps
    if finished:
        model = job.task.networks["model"]
        weights = whole_tensors(ema.weights() if ema is not None else model.state_dict(), keep=parallel.first)
        parallel.on_rank0(lambda: job.task.export(folder / "model", weights))
    exported = folder / "model" if finished else checkpoints.latest()
    assert exported is not None
    return Outcome(finished, trainer.progress.step, exported, trainer.stopped_by, parallel.first)


def _slow_types(recipe: RunRecipe, device: torch.device) -> Iterator[str]:
    """Yield a note about the recipe's products in bfloat16 where the device has no instructions for them."""
    muon = recipe.optimizer.muon_precision if recipe.optimizer.name == "muon" else "float32"
    settings = {"precision": recipe.precision, "optimizer.muon_precision": muon}
    slow = [f"{name}=float32" for name, value in settings.items() if value == "bfloat16"]
    if slow and not multiplies_bfloat16(device):
        yield f"this CPU has no bfloat16 (avx512_bf16, AMX): with {' '.join(slow)} a step is many times faster"


def _first_line(recipe: RunRecipe, job: Job[Any], step: int, folder: Path, world: int) -> str:
    start = f"going on from step {step}" if step else "starting"
    ranks = f" on {world} ranks" if world > 1 else ""
    parameters = sum(parameter.numel() for parameter in job.task.networks["model"].parameters())
    return (
        f"{recipe.name}: {start} of {recipe.schedule.steps}, batch {recipe.batch_size}{ranks},"
        f" {parameters / 1e6:.2f} M parameters{', ' * bool(job.describe)}{job.describe}; in {folder}"
    )
