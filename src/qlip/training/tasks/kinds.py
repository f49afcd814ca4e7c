"""The tokenizer's two kinds of training, as entry points of the group ``qlip.tasks``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from qlip.data.loader.batch import Batch
from qlip.data.loader.stream import Source
from qlip.data.sources.training_text import TrainingText
from qlip.training.job import Hook, Job
from qlip.training.parallel.distributed import Parallel
from qlip.training.plan import Plan
from qlip.training.recipe_schema import RunRecipe
from qlip.training.tasks.build import (
    VOCABULARY,
    ImageFeeds,
    build_model,
    build_processor,
    build_task,
    first_images,
    make_vocabulary,
    open_training_feed,
)
from qlip.training.tasks.image_log import ImageHook
from qlip.training.tasks.plan import flops_per_image, plan
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe
from qlip.training.tasks.stage1 import Stage1
from qlip.training.tasks.stage2 import Stage2
from qlip.training.tasks.training_text import record_training_text
from qlip.training.tasks.validation import ValidationHook

IMAGES = "pictures"
"""Folder of the log's images; runs of version 0.1 have the same."""


class _TokenizerKind:
    """A stage of the tokenizer's training."""

    Recipe: type[RunRecipe]
    folders: ClassVar = (VOCABULARY, IMAGES)

    def build(self, recipe: AnyRecipe, parallel: Parallel, folder: Path) -> Job[Batch]:
        """See :class:`qlip.training.job.Kind`."""
        parallel.on_rank0(lambda: make_vocabulary(recipe, folder, parallel.console))
        processor = parallel.all_or_none(lambda: build_processor(recipe, folder))
        model = build_model(recipe, processor).to(parallel.device)
        task = build_task(recipe, model, processor, parallel.wrap)
        tokenizer = processor.tokenizer if isinstance(recipe, Stage1Recipe) else None
        feed = open_training_feed(recipe, processor.preprocessing, tokenizer)
        if isinstance(recipe, Stage1Recipe) and isinstance(task, Stage1):
            open_own = partial(open_training_feed, recipe, processor.preprocessing, None)  # not the workers' files
            parallel.on_rank0(lambda: record_training_text(recipe, open_own, folder / VOCABULARY))
            task.training_text = TrainingText.read(folder / VOCABULARY)
        return Job(
            task,
            feed,
            _hooks(recipe, task, feed, parallel, folder),
            unit="images",
            flops_per_sample=partial(flops_per_image, recipe, model.config),
            describe=_describe(feed),
        )

    def plan(self, recipe: AnyRecipe) -> Plan:
        """See :class:`qlip.training.plan.Planned`."""
        return plan(recipe)


class Stage1Kind(_TokenizerKind):
    """Reconstruction, quantisation and alignment."""

    Recipe = Stage1Recipe


class Stage2Kind(_TokenizerKind):
    """Fidelity: the bottleneck and the decoder."""

    Recipe = Stage2Recipe


def _hooks(recipe: AnyRecipe, task: Stage1 | Stage2, feed: ImageFeeds, parallel: Parallel, folder: Path) -> list[Hook]:
    """Images and held-out metrics, as the recipe asks."""
    hooks: list[Hook] = []
    if recipe.log.images_every:
        pixels = first_images(feed, recipe.log.images).to(parallel.device)
        hooks.append(ImageHook(task.reconstruct, pixels, recipe.log.images_every, folder / IMAGES))
    if recipe.validation is not None:
        hooks.append(ValidationHook(recipe.validation, task.model, task.processor, parallel.console, recipe.aligned))
    return hooks


def _describe(feed: ImageFeeds) -> str:
    counted = sum(len(source.images) for source in feed.sources if isinstance(source, Source))
    streamed = sum(not isinstance(source, Source) for source in feed.sources)
    images = f"{counted:,} images" + (f" and {streamed} streams" if streamed else "")
    return f"{images} of {len(feed.sources)} sources"
