"""Plan of a tokenizer's training, for a dry run, also where data or the checkpoint to start from are not there yet.

What is missing is said, and everything else is told all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlip import recipes
from qlip.data.config import SourceConfig
from qlip.data.image_feed import open_source
from qlip.data.loader.batch import Batch, no_text
from qlip.data.loader.feed import share_of
from qlip.data.loader.sampler import BLOCK, apportion
from qlip.data.loader.stream import Source
from qlip.data.shards.streaming import MixedStream, StreamedSource
from qlip.errors import QLIPError
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import Preprocessing, QLIPConfig, QLIPModel, QLIPProcessor
from qlip.modeling.checkpoint import Files
from qlip.modeling.parts import part_of
from qlip.training.costs import count_flops, without_memory
from qlip.training.plan import SAMPLES, Plan, RankReads, SourceSummary
from qlip.training.recipe import load_recipe
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe, TokenizerRecipe
from qlip.training.tasks.recipe_schema import VocabularySection
from qlip.training.tasks.stage1 import Stage1
from qlip.training.tasks.stage2 import Stage2

KEYS_SHOWN = 3
FLOAT = 4
LOGIT_TABLES = 5
"""Tables that exist at once for a chunk: the logits, as rows, as columns, targets, errors."""


def plan(recipe: AnyRecipe) -> Plan:
    """Make the plan of a recipe of either stage.

    Raises:
        QLIPError: neither the checkpoint to start from nor a hint of its architecture is there.
    """
    return plan_for(recipe, *find_config(recipe))


def plan_for(recipe: AnyRecipe, config: QLIPConfig, notes: Sequence[str] = ()) -> Plan:
    """Make the plan of a recipe whose model has a known configuration."""
    units: dict[str, float] = {"image tokens": config.vision_config.grid_size**2}
    saving = []
    if recipe.aligned:
        assert isinstance(recipe, Stage1Recipe)
        units["text tokens"] = config.text_config.max_position_embeddings
        if (recipe.losses.align.chunk_size or 10**9) > 256:
            saving.append({"losses.align.chunk_size": 256})
    with without_memory():
        task = make_task(recipe, config)
    return Plan(
        task,
        make_batch(config, SAMPLES),
        units,
        part_of,
        config.to_json_dict(),
        notes,
        partial(flops_per_image, recipe, config),
        partial(_passing, config),
        saving,
        partial(_read, recipe, config.vision_config.image_size),
    )


def make_task(recipe: AnyRecipe, config: QLIPConfig) -> Stage1 | Stage2:
    """The task of a recipe, with random weights, at a step at which all of its losses are active."""
    model = QLIPModel(config).train()
    side = config.vision_config.image_size
    processor = QLIPProcessor(Preprocessing((side, side), side, patch_size=config.vision_config.patch_size), None)
    if isinstance(recipe, Stage1Recipe):
        return Stage1(model, processor, recipe)
    task = _OnePass(model, processor, recipe, perceptual=LPIPS() if recipe.losses.alpha_p else None)
    if (discriminator := recipe.active_discriminator) is not None:
        penalties = -(-discriminator.warmup // discriminator.r1_every)
        task.before_step(discriminator.start + penalties * discriminator.r1_every)
    return task


class _OnePass(Stage2):
    """Stage 2 whose discriminator sees images rebuilt in one pass: indices without memory have no values to check."""

    @torch.no_grad()
    def pair(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Stage2.pair`."""
        return self.signed(pixel_values), self.signed(self.model(pixel_values=pixel_values).reconstructions)


def make_batch(config: QLIPConfig, count: int) -> Batch:
    """Images of the trained size without memory, each with a caption of the text tower's length."""
    side, zeros = config.vision_config.image_size, torch.zeros(count, dtype=torch.int64)
    with without_memory():
        pixels = torch.zeros(count, 3, side, side)
    ids = zeros[:, None].repeat(1, config.text_config.max_position_embeddings)
    return Batch(pixels, ids, zeros == 0, zeros, [""] * count, [None] * count)


def flops_per_image(recipe: AnyRecipe, config: QLIPConfig) -> float:
    """Floating-point operations of one image and its caption, both passes, by the model alone."""
    plain = recipe.model_copy(update={"discriminator": None}) if isinstance(recipe, Stage2Recipe) else recipe
    with without_memory():
        task, batch = make_task(plain, config), make_batch(config, 1)
        (network,) = task.phases[0].modules
        inputs = (batch.pixel_values, batch.input_ids) if isinstance(task, Stage1) else (batch.pixel_values,)
        return count_flops(lambda: network(*inputs, True))


def _passing(config: QLIPConfig, world: int, recipe: AnyRecipe) -> dict[str, int]:
    """Bytes of a chunk of the table of logits, and of gathered embeddings."""
    if not isinstance(recipe, Stage1Recipe) or not recipe.aligned:
        return {}
    rows = -(-recipe.batch_size // world)
    # a ring of ranks passes one rank's texts at a time
    columns = rows if recipe.losses.align.kind == "siglip" else recipe.batch_size
    chunk = min(rows, recipe.losses.align.chunk_size or rows)
    return {
        "logits": LOGIT_TABLES * FLOAT * chunk * columns,
        # both sides, with gradients; and all texts, with theirs
        "embeddings": FLOAT * config.projection_dim * (4 * rows + 2 * columns),
    }


# -------------------------------------------------------------------- the model


def find_config(recipe: TokenizerRecipe) -> tuple[QLIPConfig, list[str]]:
    """The model's configuration, also where the checkpoint to start from is not there yet; and what was assumed.

    Raises:
        QLIPError: neither the checkpoint nor a hint of its architecture is there.
    """
    if recipe.model.config is not None:
        config = QLIPConfig.named(recipe.model.config)
        size = (recipe.vocabulary or VocabularySection()).size
        text = config.text_config.model_copy(update={"vocab_size": size})
        return config.model_copy(update={"text_config": text}), []
    init = recipe.model.init
    assert init is not None
    try:
        return Files(init, local_files_only=True).config(), []
    except QLIPError as error:
        if Path(init).expanduser().exists():
            raise
        name = _guess(init)
        if name is None:
            raise QLIPError(f"model.init: {error}; without it the architecture is unknown") from None
        return name[1], [f"model.init: {init} is not there yet; its architecture is taken to be {name[0]}'s"]


def _guess(init: str) -> tuple[str, QLIPConfig] | None:
    """From a checkpoint's path to a configuration: of the recipe that writes it there, or of a name in the path."""
    parts = Path(init).parts
    if parts[:1] == ("runs",) and parts[-1:] == ("model",):
        writer = "/".join(parts[1:-1])
        if recipes.path(writer) is not None:
            written = load_recipe(writer)
            assert isinstance(written, TokenizerRecipe)
            return writer, find_config(written)[0]
    for part in reversed(parts):
        try:
            return part, QLIPConfig.named(part)
        except QLIPError:
            continue
    return None


# -------------------------------------------------------------------- data


def _read(recipe: AnyRecipe, side: int, world: int) -> tuple[list[SourceSummary], list[RankReads], list[str]]:
    """Count the sources; where all are there, find what each rank would read at the first step; and notes."""
    seats = apportion([source.weight for source in recipe.data.sources], BLOCK)
    opened, summaries = [], []
    for settings, seat in zip(recipe.data.sources, seats, strict=True):
        source = _open(recipe, settings, side)
        images = len(source.images) if isinstance(source, Source) else None
        missing = str(source) if isinstance(source, QLIPError) else None
        samples = recipe.batch_size * recipe.schedule.steps * seat // BLOCK
        name = settings.name or settings.path or ""
        summaries.append(SourceSummary(name, seat / BLOCK, samples, images, settings.streaming, missing))
        if not isinstance(source, QLIPError):
            opened.append(source)
    if len(opened) < len(summaries):
        return summaries, [], ["data: not all sources are there, so what a rank would read is unknown"]
    stream = MixedStream(opened, recipe.seed, no_text, recipe.batch_size)
    return summaries, [_first_step(stream, rank, world) for rank in range(world)], []


def _open(recipe: AnyRecipe, settings: SourceConfig, side: int) -> Source | StreamedSource | QLIPError:
    """A source, or why it cannot be opened."""
    try:
        return open_source(recipe.data, settings, recipe.seed, Preprocessing((side, side), None), recipe.batch_size)
    except QLIPError as error:
        return error


def _first_step(stream: MixedStream, rank: int, world: int) -> RankReads:
    first, end = share_of(stream.batch_size, rank, world)
    positions = np.arange(first, min(end, first + KEYS_SHOWN))
    places = stream.mixture.places(positions)
    keys = []
    for position, number, index in zip(
        positions.tolist(), places.sources.tolist(), places.indices.tolist(), strict=True
    ):
        source = stream.sources[number]
        if isinstance(source, Source):
            keys.append(f"{source.images.name}/{source.images.key(index)}")
        else:
            cursor = source.images.cursor_at(0, position, stream.batch_size)
            keys.append(f"cursor {cursor}: {source.images.shards[source.images.draw(cursor)[1]]}")
    return RankReads(rank, first, end - 1, tuple(dict.fromkeys(keys)))
