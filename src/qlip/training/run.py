"""From a recipe to a run folder: everything is built here, trained by the Trainer, and exported.

A run folder holds ``recipe.yaml`` (resolved), ``sessions.json`` (versions and git state of each start),
``vocabulary/``, ``checkpoints/``, ``log.jsonl``, ``tensorboard/``, ``pictures/`` and, at the end, ``model/``, a
checkpoint to load by path.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch
import yaml
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlip.data.loader.stream import ImageFeed, Source
from qlip.data.shards.streaming import StreamedFeed
from qlip.errors import QLIPError
from qlip.files import locked, write_text
from qlip.modeling import QLIPModel
from qlip.training.flops import device_peak, training_flops
from qlip.training.log.environment import record_session
from qlip.training.log.image_log import PictureHook
from qlip.training.log.runlog import RunLog, SilentLog
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import AnyRecipe, Recipe, check_recipe
from qlip.training.recipe_diff import first_difference
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.tasks import Stage1, Stage2
from qlip.training.tasks.build import (
    build_model,
    build_processor,
    build_task,
    make_vocabulary,
    open_training_feed,
    some_pictures,
)
from qlip.training.tasks.validation import ValidationHook
from qlip.training.trainer import Trainer

FREE_KEYS = "checkpoint log validation parallel data.num_workers data.prefetch data.broken_limit data.store".split()
"""What may change when a run goes on: it moves no weight."""
LOCK = ".lock"
"""Of a run folder: the process that trains there holds it."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: all steps are taken and ``model`` is written.
        step: steps taken.
        model: the exported checkpoint folder; of the last saved checkpoint where the run was stopped.
        stopped_by: the signal that asked to stop, or None.
        first: this is the rank that speaks for all.
    """

    finished: bool
    step: int
    model: Path
    stopped_by: Signals | None
    first: bool = True


def run(recipe: AnyRecipe, folder: Path, console: Console | None = None, restart: bool = False) -> Outcome:
    """Train a recipe in a folder, going on from its last checkpoint if it has one; every rank of torchrun calls it.

    Args:
        recipe: checked, from :func:`qlip.training.load_recipe`.
        folder: of the run, seen by all ranks; made if absent.
        console: for progress; standard error by default.
        restart: delete an earlier run in the folder first.

    Raises:
        QLIPError: the folder is another run's or in use, data cannot be read, a loss is not finite, the disk is full.
    """
    console = console or Console(stderr=True)
    with ExitStack() as held, Parallel(recipe) as parallel:

        def claim() -> None:
            busy = f"{folder}: another process trains here; wait for it, or choose another folder"
            held.enter_context(locked(folder / LOCK, busy))
            if restart:
                _clear(folder)
            _claim(recipe, folder)
            record_session(folder)

        parallel.on_rank0(claim)
        return _run(recipe, folder, console if parallel.first else Console(quiet=True), parallel)


def _run(recipe: AnyRecipe, folder: Path, console: Console, parallel: Parallel) -> Outcome:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    parallel.on_rank0(lambda: make_vocabulary(recipe, folder, console))
    processor = parallel.all_or_none(lambda: build_processor(recipe, folder))
    model = build_model(recipe, processor).to(parallel.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    task = build_task(recipe, model, processor, parallel.wrap)
    ema = EMA(model, recipe.ema.decay) if recipe.ema is not None else None
    feed = open_training_feed(recipe, processor.preprocessing, processor.tokenizer if recipe.stage == 1 else None)
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.keep, parallel, recipe.checkpoint.asynchronous)
    trainer = Trainer(
        task,
        recipe,
        parallel,
        checkpoints,
        lambda state, rank, world: feed.open(state, rank=rank, world=world),
        feed.merge,
        lambda step: _open_log(recipe, folder, step, model, console, parallel),
        ema,
        _hooks(recipe, folder, task, feed, ema, console, parallel),
    )
    _announce(recipe, parameters, feed, trainer.progress.step, parallel.world, folder, console)
    trainer.run()
    finished = trainer.progress.step >= recipe.schedule.steps
    if finished:
        weights = _whole(ema.weights() if ema is not None else model.state_dict())
        parallel.on_rank0(lambda: task.export(folder / "model", weights))
    exported = folder / "model" if finished else checkpoints.latest()
    assert exported is not None
    return Outcome(finished, trainer.progress.step, exported, trainer.stopped_by, parallel.first)


def _hooks(
    recipe: AnyRecipe,
    folder: Path,
    task: Stage1 | Stage2,
    feed: ImageFeed | StreamedFeed,
    ema: EMA | None,
    console: Console,
    parallel: Parallel,
) -> list[Callable[[int, RunLog], None]]:
    """Images and held-out figures, as the recipe has them; of the averaged weights where there is an average."""
    applied = ema.applied if ema is not None else nullcontext
    hooks: list[Callable[[int, RunLog], None]] = []
    if recipe.log.pictures_every:
        pixels = some_pictures(feed, recipe.log.pictures).to(parallel.device)
        hooks.append(PictureHook(task.reconstruct, pixels, recipe.log.pictures_every, folder / "pictures", applied))
    if recipe.validation is not None:
        hooks.append(ValidationHook(recipe.validation, task.model, task.processor, console, applied, recipe.aligned))
    return hooks


def _open_log(
    recipe: AnyRecipe, folder: Path, step: int, model: QLIPModel, console: Console, parallel: Parallel
) -> RunLog:
    if not parallel.first:
        return SilentLog()
    peak = device_peak(parallel.device)
    return RunLog(
        folder,
        step,
        recipe.schedule.steps,
        recipe.log.tensorboard,
        console,
        wandb=recipe.log.wandb,
        name=recipe.name,
        config=recipe.model_dump(mode="json"),
        flops=training_flops(model, aligned=recipe.aligned, rebuilt=recipe.rebuilds),
        peak=None if peak is None else peak * parallel.world,
    )


def _whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what ranks may share; all of them call it."""
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu()
        for name, weight in weights.items()
    }


def _announce(
    recipe: Recipe,
    parameters: int,
    feed: ImageFeed | StreamedFeed,
    step: int,
    world: int,
    folder: Path,
    console: Console,
) -> None:
    counted = sum(len(source.images) for source in feed.sources if isinstance(source, Source))
    streamed = sum(not isinstance(source, Source) for source in feed.sources)
    pictures = f"{counted:,} pictures" + (f" and {streamed} streams" if streamed else "")
    start = f"going on from step {step}" if step else "starting"
    ranks = f" on {world} ranks" if world > 1 else ""
    console.print(
        f"{recipe.name}: {start} of {recipe.schedule.steps}, batch {recipe.batch_size}{ranks}, {parameters / 1e6:.2f} M"
        f" parameters, {pictures} of {len(feed.sources)} sources; in {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _claim(recipe: Recipe, folder: Path) -> None:
    """Store the resolved recipe, or refuse to go on with another one."""
    path = folder / "recipe.yaml"
    if path.exists():
        stored = check_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        changed = first_difference(stored.model_dump(mode="json"), recipe.model_dump(mode="json"), FREE_KEYS)
        if changed is not None:
            raise QLIPError(
                f"{folder}: was started with another {changed.key} ({changed.old!r}, now {changed.new!r});"
                " choose another folder, or start anew with --restart"
            )
    write_text(path, recipe.to_yaml())


def _clear(folder: Path) -> None:
    """Delete what a run left."""
    for name in ("checkpoints", "tensorboard", "wandb", "pictures", "vocabulary", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.yaml", "sessions.json", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)
