"""A run over uneven batches on however many ranks this is, from a recipe as a dictionary."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlip import QLIPModel
from qlip.data.feed import PositionFeed
from qlip.data.stream import Batch
from qlip.training.build import build_model, build_processor, open_training_feed
from qlip.training.checkpoints import Checkpoints
from qlip.training.distributed import Parallel
from qlip.training.ema import EMA
from qlip.training.recipe import Stage1Recipe, check_recipe
from qlip.training.runlog import RunLog, SilentLog
from qlip.training.tasks import Stage1
from qlip.training.trainer import Trainer

WITHOUT_WORDS, EMPTY_SHARE, EMPTY = 4, 6, 8
"""Steps whose batch has no words, no pictures on the first of two ranks, no pictures at all."""


def train(values: dict[str, Any], folder: Path, stop_after: int | None = None) -> None:
    """Train and save; `keys-<rank>.jsonl` gets what each step of a rank consumed.

    Args:
        values: a stage 1 recipe.
        folder: of the run.
        stop_after: the last rank gets a SIGTERM after so many steps.
    """
    recipe = check_recipe(values, "test")
    assert isinstance(recipe, Stage1Recipe)
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (lives as long as the process)
    torch.manual_seed(recipe.seed)
    with Parallel(recipe) as parallel:
        processor = build_processor(recipe, folder, console)
        model = build_model(recipe, processor).to(parallel.device)
        task = Stage1(model, processor, recipe, parallel.wrap)
        ema = EMA(model, recipe.ema.decay) if recipe.ema is not None else None
        checkpoints = Checkpoints(folder / "checkpoints", 10, parallel, recipe.checkpoint.asynchronous)
        feed = open_training_feed(recipe, processor.preprocessing, processor.tokenizer)
        assert isinstance(feed, PositionFeed)
        stream = feed.stream

        def open_batches(state: dict[str, Any] | None, rank: int, world: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
            step = 0 if state is None else state["batches"]
            with (folder / f"keys-{rank}-of-{world}.jsonl").open("a") as keys:
                while True:
                    positions = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
                    batch = _made_uneven(stream.collate([stream[position] for position in positions]), step)
                    shares = [recipe.batch_size * part // world for part in range(world + 1)]
                    share = _rows(batch, shares[rank], shares[rank + 1])
                    keys.write(json.dumps([step, share.keys]) + "\n")
                    keys.flush()
                    step += 1
                    yield share, {"batches": step}

        def stop(step: int, log: RunLog) -> None:
            if step == stop_after and parallel.rank == parallel.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def open_log(step: int) -> RunLog:
            return RunLog(folder, step, recipe.schedule.steps, False, console) if parallel.first else SilentLog()

        trainer = Trainer(
            task, recipe, parallel, checkpoints, open_batches, lambda states: states[0], open_log, ema, [stop]
        )
        trainer.run()
        assert (trainer.stopped_by is None) == (stop_after is None)
        _check_ways_into_the_model(model, folder / "features.json", parallel)


def _made_uneven(batch: Batch, step: int) -> Batch:
    """Some pictures lose their words, some steps lose all of them, or their pictures."""
    words = [number % 3 > 0 and step != WITHOUT_WORDS for number in range(len(batch))]
    batch = replace(batch, has_caption=batch.has_caption & torch.tensor(words))
    if step == EMPTY_SHARE:
        return _rows(batch, 0, 0, *range(len(batch) // 2, len(batch)))
    return _rows(batch, 0, 0) if step == EMPTY else batch


def _rows(batch: Batch, start: int, stop: int, *more: int) -> Batch:
    rows = [*(row for row in range(start, stop) if row < len(batch)), *more]
    return Batch(
        batch.pixel_values[rows],
        batch.input_ids[rows],
        batch.has_caption[rows],
        batch.match_ids[rows],
        [batch.keys[row] for row in rows],
        [batch.captions[row] for row in rows],
    )


@torch.no_grad()
def _check_ways_into_the_model(model: QLIPModel, path: Path, parallel: Parallel) -> None:
    """Store what a trained model makes of pictures and words by each of its methods."""
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    words = torch.tensor([[model.text_model.eos_token_id] * 8, [1, 2, 3, 4, 5, 6, 7, model.text_model.eos_token_id]])
    model.eval()
    indices = model.encode(pictures)
    found = {
        "indices": indices,
        "decoded": model.decode(indices),
        "image": model.get_image_features(pictures),
        "text": model.get_text_features(words),
        "patches": model.get_patch_features(pictures),
    }
    model.train()
    if parallel.first:
        path.write_text(json.dumps({name: tensor.flatten().tolist() for name, tensor in found.items()}))
