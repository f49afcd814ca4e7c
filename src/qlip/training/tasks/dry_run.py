"""Estimate of what a recipe would do: parameters, memory, samples, rates, and what each rank would read.

It allocates no weights and opens data only to count them; what is not there yet (images, the checkpoint to start
from) is said, and everything else is told all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip import recipes
from qlip.data.config import SourceConfig
from qlip.data.image_feed import open_source
from qlip.data.loader.batch import no_text
from qlip.data.loader.feed import check_layout, share_of
from qlip.data.loader.sampler import BLOCK, apportion
from qlip.data.loader.stream import Source
from qlip.data.shards.streaming import MixedStream, StreamedSource
from qlip.errors import QLIPError
from qlip.modeling import Preprocessing, QLIPConfig, QLIPModel
from qlip.modeling.checkpoint import Files
from qlip.modeling.parts import PARTS, Part, part_of, qlip_groups
from qlip.runtime.machine import total_memory
from qlip.training.batches import number_of_micro_batches
from qlip.training.optim.optimizers import peak_settings
from qlip.training.optim.schedule import warmup_cosine
from qlip.training.parallel.distributed import check_shares
from qlip.training.recipe import check_recipe, load_recipe
from qlip.training.recipe_schema import RunRecipe
from qlip.training.tasks.costs import flops_per_image
from qlip.training.tasks.memory import (
    GIB,
    MemoryEstimate,
    estimate_memory,
    meta_model,
    parameters_of,
    samples_at_a_time,
)
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe
from qlip.training.tasks.recipe_schema import VocabularySection

KEYS_SHOWN = 3


@dataclass(frozen=True)
class PartSummary:
    """Parameters of a part, how many of them train, and their peak rates; Muon's matrices have a range of their own."""

    part: Part
    parameters: int
    trained: int
    rates: tuple[float, float] | None
    muon_rates: tuple[float, float] | None


@dataclass(frozen=True)
class SourceSummary:
    """A source of the stream.

    Attributes:
        name: or path.
        share: of the stream.
        samples: drawn from it in the whole run.
        images: how many it has; None if it cannot be known.
        streamed: read from front to back, so its images are not counted.
        missing: why it cannot be read.
    """

    name: str
    share: float
    samples: int
    images: int | None
    streamed: bool
    missing: str | None

    @property
    def epochs(self) -> float | None:
        """How often each image comes."""
        return None if not self.images else self.samples / self.images


@dataclass(frozen=True)
class RankReads:
    """Samples that a rank reads at the first step: positions in the stream, and the first keys (or shards)."""

    rank: int
    first: int
    last: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Remedy:
    """Settings that change the estimate, and what it then is."""

    settings: tuple[str, ...]
    total: int
    fits: bool


@dataclass(frozen=True)
class Device:
    """Device that the estimate is compared with; ``memory`` in bytes."""

    name: str
    memory: int
    gpu: bool


@dataclass(frozen=True)
class DryRun:
    """All that is known beforehand. Tokens are the images' and the texts' (of full length); memory is of one rank."""

    name: str
    stage: int
    world: int
    config: QLIPConfig
    notes: list[str]
    parts: list[PartSummary]
    memory: MemoryEstimate
    device: Device
    remedies: list[Remedy]
    batch_size: int
    micro_batches: int
    samples_at_a_time: int
    steps: int
    image_tokens: int
    text_tokens: int
    flops: float
    schedule: list[tuple[int, float]]
    sources: list[SourceSummary]
    ranks: list[RankReads] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples of the whole run."""
        return self.batch_size * self.steps

    @property
    def fits(self) -> bool:
        """True if the memory of a rank is enough."""
        return self.memory.total <= self.device.memory


def dry_run(recipe: RunRecipe, world: int = 1, memory: float | None = None) -> DryRun:
    """Estimate what a recipe would take.

    Args:
        recipe: checked.
        world: ranks.
        memory: of each rank's device, in GiB; None asks this machine's GPU, or else its RAM.

    Raises:
        QLIPError: the model's architecture cannot be known, or the ranks cannot share the batch.
    """
    recipe = _checked(recipe)
    check_layout(recipe.batch_size, 0, recipe.data.num_workers, world=world)
    check_shares(recipe.parallel, world)
    config, notes = find_config(recipe)
    model = meta_model(recipe, config)
    parameters = parameters_of(recipe, model)
    device = _device(memory)
    needs = Needs(config, parameters, world, device)
    estimate = needs.of(recipe)
    sources, ranks = _read(recipe, config, world, notes)
    fits = estimate.total <= device.memory
    return DryRun(
        name=recipe.name,
        stage=1 if isinstance(recipe, Stage1Recipe) else 2,
        world=world,
        config=config,
        notes=notes,
        parts=_parts(recipe, model, parameters),
        memory=estimate,
        device=device,
        remedies=[] if fits else find_remedies(recipe, needs),
        batch_size=recipe.batch_size,
        micro_batches=number_of_micro_batches(recipe.batch_size, world, recipe.micro_batch_size),
        samples_at_a_time=samples_at_a_time(recipe, world),
        steps=recipe.schedule.steps,
        image_tokens=config.vision_config.grid_size**2,
        text_tokens=config.text_config.max_position_embeddings if recipe.aligned else 0,
        flops=flops_per_image(recipe, config),
        schedule=_schedule(recipe),
        sources=sources,
        ranks=ranks,
    )


def _checked(recipe: RunRecipe) -> AnyRecipe:
    if not isinstance(recipe, Stage1Recipe | Stage2Recipe):
        raise QLIPError(f"{recipe.name}: task {recipe.task} has no dry run; only the tokenizer's two stages have")
    return recipe


# -------------------------------------------------------------------- the model


def find_config(recipe: AnyRecipe) -> tuple[QLIPConfig, list[str]]:
    """The model's configuration, also where the checkpoint to start from is not there yet; and what was assumed.

    Raises:
        QLIPError: neither the checkpoint nor a hint of its architecture is there.
    """
    if recipe.model.config is not None:
        config = QLIPConfig.named(recipe.model.config)
        size = (recipe.vocabulary or VocabularySection()).size if isinstance(recipe, Stage1Recipe) else None
        if size is None:
            return config, []
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
            return writer, find_config(_checked(load_recipe(writer)))[0]
    for part in reversed(parts):
        try:
            return part, QLIPConfig.named(part)
        except QLIPError:
            continue
    return None


def _parts(recipe: AnyRecipe, model: QLIPModel, parameters: Mapping[str, Tensor]) -> list[PartSummary]:
    chosen = peak_settings(parameters.items(), recipe.optimizer, qlip_groups(model), recipe.optimizer.parts)
    found = []
    for part in PARTS:
        names = [name for name in parameters if part_of(name) == part]
        trained = [name for name in names if name in chosen]
        rates = [sorted(chosen[name].lr for name in trained if chosen[name].muon == muon) for muon in (False, True)]
        low_high = [(of_kind[0], of_kind[-1]) if of_kind else None for of_kind in rates]
        count = sum(parameters[name].numel() for name in names)
        found.append(PartSummary(part, count, sum(parameters[name].numel() for name in trained), *low_high))
    return [summary for summary in found if summary.parameters]


def _schedule(recipe: AnyRecipe) -> list[tuple[int, float]]:
    """Steps, 0 for the first, and the factor on every peak rate."""
    schedule = recipe.schedule
    steps, warmup = schedule.steps, min(schedule.warmup, schedule.steps - 1)
    points = sorted({0, warmup, *(steps * quarter // 4 for quarter in (1, 2, 3)), steps - 1})
    return [(step, warmup_cosine(step, steps=steps, warmup=schedule.warmup, floor=schedule.floor)) for step in points]


# -------------------------------------------------------------------- memory


def _device(memory: float | None) -> Device:
    if memory is not None:
        return Device("the device", int(memory * GIB), gpu=True)
    if torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, gpu=True)
    if (found := total_memory()) is None:
        raise QLIPError("this system does not say how much memory it has; name the memory to plan for")
    return Device("this machine's RAM", found, gpu=False)


@dataclass(frozen=True)
class Needs:
    """Parts that do not change from one estimate to the next."""

    config: QLIPConfig
    parameters: dict[str, Tensor]
    world: int
    device: Device

    def of(self, recipe: AnyRecipe) -> MemoryEstimate:
        """Estimate for a recipe that trains the same parameters."""
        return estimate_memory(recipe, self.config, self.world, self.device.gpu, self.parameters)

    def after(self, recipe: AnyRecipe, change: Mapping[str, Any]) -> Remedy:
        """Estimate for a recipe with other values at dotted keys."""
        values = recipe.model_dump(mode="json")
        for key, value in change.items():
            *sections, name = key.split(".")
            section = values
            for one in sections:
                section = section[one]
            section[name] = value
        total = self.of(_checked(check_recipe(values, recipe.name))).total
        settings = tuple(f"{key}={str(value).lower()}" for key, value in change.items())
        return Remedy(settings, total, total <= self.device.memory)

    def in_smaller_pieces(self, recipe: AnyRecipe, change: Mapping[str, Any]) -> Remedy:
        """The largest micro-batch, halved as often as it takes, that fits with other changes; 1 if none does."""
        size = samples_at_a_time(recipe, self.world)
        while True:
            size = max(1, size // 2)
            remedy = self.after(recipe, {**change, "micro_batch_size": size})
            if remedy.fits or size == 1:
                return remedy


def find_remedies(recipe: AnyRecipe, needs: Needs) -> list[Remedy]:
    """Settings that make it fit, each alone; where none does, as many together as it takes, or all of them."""
    changes: list[dict[str, Any]] = []
    if isinstance(recipe, Stage1Recipe) and recipe.aligned and (recipe.losses.align.chunk_size or 10**9) > 256:
        changes.append({"losses.align.chunk_size": 256})
    if not recipe.activation_checkpointing:
        changes.append({"activation_checkpointing": True})
    if recipe.precision == "float32" and needs.device.gpu:
        changes.append({"precision": "bfloat16"})
    if needs.world > 1 and recipe.parallel.kind == "ddp":
        changes.append({"parallel.kind": "fsdp"})
    alone = [needs.after(recipe, change) for change in changes]
    alone.append(needs.in_smaller_pieces(recipe, {}))
    if fitting := [remedy for remedy in alone if remedy.fits]:
        return fitting
    together: dict[str, Any] = {}
    best = alone[-1]
    for change in changes:
        together |= change
        best = needs.in_smaller_pieces(recipe, together)
        if best.fits:
            break
    return [best]


# -------------------------------------------------------------------- data


def _read(
    recipe: AnyRecipe, config: QLIPConfig, world: int, notes: list[str]
) -> tuple[list[SourceSummary], list[RankReads]]:
    """Count the sources; where all are there, find what each rank would read at the first step."""
    seats = apportion([source.weight for source in recipe.data.sources], BLOCK)
    opened, summaries = [], []
    for settings, seat in zip(recipe.data.sources, seats, strict=True):
        source = _open(recipe, settings, config.vision_config.image_size)
        images = len(source.images) if isinstance(source, Source) else None
        missing = str(source) if isinstance(source, QLIPError) else None
        samples = recipe.batch_size * recipe.schedule.steps * seat // BLOCK
        name = settings.name or settings.path or ""
        summaries.append(SourceSummary(name, seat / BLOCK, samples, images, settings.streaming, missing))
        if not isinstance(source, QLIPError):
            opened.append(source)
    if len(opened) < len(summaries):
        notes.append("data: not all sources are there, so what a rank would read is unknown")
        return summaries, []
    stream = MixedStream(opened, recipe.seed, no_text, recipe.batch_size)
    return summaries, [_first_step(stream, rank, world) for rank in range(world)]


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
