"""A run over uneven batches on however many ranks this is, from a recipe as a dictionary."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlip import QLIPModel
from qlip.data.loader.batch import Batch
from qlip.data.loader.feed import State, share_of
from qlip.training.log.runlog import RunLog, SilentLog
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.tasks.build import build_model, build_processor, build_task, open_training_feed
from qlip.training.trainer import Trainer

WITHOUT_WORDS, EMPTY_SHARE, EMPTY = 4, 6, 8
"""Steps whose batch has no words, no images on the first of two ranks, no images at all."""


@dataclass
class OtherFeed:
    """A feed whose batches come from a function of state, rank and world."""

    of: Any
    batches: Callable[[State | None, int, int], Iterator[tuple[Any, State]]]

    @property
    def batch_size(self) -> int:
        """Samples per batch."""
        return self.of.batch_size

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Any, State]]:
        """The function's batches."""
        return self.batches(state, rank, world)

    def merge(self, states: Sequence[State]) -> State:
        """Merge as the other feed does."""
        return self.of.merge(states)


def train(values: dict[str, Any], folder: Path, stop_after: int | None = None) -> None:
    """Train and save; ``keys-<rank>-of-<world>.jsonl`` gets what each step of a rank consumed.

    Args:
        values: a recipe of either stage.
        folder: of the run.
        stop_after: the last rank gets a SIGTERM after so many steps.
    """
    recipe = check_recipe(values, "test")
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (lives as long as the process)
    torch.manual_seed(recipe.seed)
    with Parallel(recipe) as parallel:
        processor = build_processor(recipe, folder)
        model = build_model(recipe, processor).to(parallel.device)
        task = build_task(recipe, model, processor, parallel.wrap)
        ema = EMA(model, recipe.ema.decay) if recipe.ema is not None else None
        checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.model_copy(update={"keep": 10}), parallel)
        tokenizer = processor.tokenizer if recipe.task == "stage1" else None
        feed = open_training_feed(recipe, processor.preprocessing, tokenizer)

        def open_batches(state: State | None, rank: int, world: int) -> Iterator[tuple[Batch, State]]:
            first = share_of(recipe.batch_size, rank, world)[0]
            keys = (folder / f"keys-{rank}-of-{world}.jsonl").open("a")
            with closing(feed.open(state, rank=rank, world=world)) as batches, keys:  # type: ignore[type-var]
                for batch, own in batches:
                    step = own["position"] // recipe.batch_size - 1
                    uneven = _made_uneven(batch, step, first, recipe.batch_size)
                    keys.write(json.dumps([step, uneven.keys]) + "\n")
                    keys.flush()
                    yield uneven, own

        def stop(step: int, log: RunLog, applied: Any) -> None:
            if step == stop_after and parallel.rank == parallel.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def open_log(step: int) -> RunLog:
            return RunLog(folder, step, recipe.schedule.steps, False, console) if parallel.first else SilentLog()

        trainer = Trainer(task, recipe, parallel, checkpoints, OtherFeed(feed, open_batches), open_log, ema, [stop])
        trainer.run()
        assert (trainer.stopped_by is None) == (stop_after is None)
        _store_ways_into_the_model(model, folder / "features.json", parallel, words=recipe.task == "stage1")


def _made_uneven(batch: Batch, step: int, first: int, batch_size: int) -> Batch:
    """Some images lose their words, some steps lose all of them, or their images.

    Args:
        batch: this rank's share.
        step: from 0.
        first: place of its first row in the global batch.
        batch_size: of the global batch.
    """
    places = torch.arange(first, first + len(batch))
    worded = (places % 3 > 0) & (step != WITHOUT_WORDS)
    batch = replace(batch, has_caption=batch.has_caption & worded)
    kept = places >= {EMPTY: batch_size, EMPTY_SHARE: batch_size // 2}.get(step, 0)
    rows = kept.nonzero().flatten().tolist()
    return Batch(
        batch.pixel_values[rows],
        batch.input_ids[rows],
        batch.has_caption[rows],
        batch.match_ids[rows],
        [batch.keys[row] for row in rows],
        [batch.captions[row] for row in rows],
    )


@torch.no_grad()
def _store_ways_into_the_model(model: QLIPModel, path: Path, parallel: Parallel, words: bool) -> None:
    """What a trained model makes of images and words by each of its methods."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    model.eval()
    indices = model.encode(images)
    found = {
        "indices": indices,
        "decoded": model.decode(indices),
        "image": model.get_image_features(images),
        "patches": model.get_patch_features(images),
    }
    if words:
        end = model.text_model.eos_token_id
        found["text"] = model.get_text_features(torch.tensor([[end] * 8, [1, 2, 3, 4, 5, 6, 7, end]]))
    model.train()
    if parallel.first:
        path.write_text(json.dumps({name: tensor.flatten().tolist() for name, tensor in found.items()}))
