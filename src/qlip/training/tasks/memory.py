"""Memory that a rank needs: an estimate from the recipe and the architecture; nothing large is allocated.

- **resident**: of each parameter 4 bytes its value and, if it trains, 4 its gradient, 8 its moments (4 with Muon) and 4
  its average; with ``fsdp`` divided by the ranks that share a copy. Under autocast 2 more for the copy of a weight
  that products take, which is shared by no one.
- **activations**: the step itself, run once without memory (:mod:`qlip.training.costs`), every image with a caption.
- **passing**, for a moment beside the activations: the layers that ``fsdp`` gathers, a chunk of the table of logits,
  gathered embeddings.
- **update**: what an optimizer's step needs for itself when activations are gone.
- **reserve**, on a GPU: its context, libraries' workspaces, what an allocator cannot use: 1 GiB and a twentieth.

tests/training/test_memory.py holds it against measured runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlip.modeling import QLIPConfig, QLIPModel
from qlip.modeling.parts import qlip_groups
from qlip.training.batches import number_of_micro_batches
from qlip.training.optim.optimizers import ParamSettings, peak_settings
from qlip.training.tasks.costs import activation_bytes
from qlip.training.tasks.discriminators import build_discriminator
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe

GIB = 2**30
VGG16_FEATURES = 14_716_160
"""Parameters of the perceptual network: VGG16's convolutions and the five weightings of their channels."""
FLOAT = 4
IMAGES = 4
"""Images of the step that is measured."""
LOGIT_TABLES = 5
"""Tables that exist at once for a chunk: the logits, as rows, as columns, targets, errors."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs.

    Attributes:
        resident: all the time, by what it is for.
        activations: most that networks hold in a step, of a micro-batch.
        passing: what comes and goes beside activations.
        update: while the optimizer moves.
        reserve: of a GPU, for what is not ours.
    """

    resident: dict[str, int]
    activations: int
    passing: dict[str, int] = field(default_factory=dict)
    update: int = 0
    reserve: int = 0

    @property
    def peak(self) -> int:
        """Most that exists at once, without the reserve."""
        step = self.activations + sum(self.passing.values())
        return sum(self.resident.values()) + max(step, self.update)

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.peak + self.reserve


def estimate_memory(
    recipe: AnyRecipe,
    config: QLIPConfig,
    world: int = 1,
    gpu: bool = True,
    parameters: dict[str, Tensor] | None = None,
) -> MemoryEstimate:
    """Estimate what one rank needs.

    Args:
        recipe: checked.
        config: of the model.
        world: number of ranks.
        gpu: whether a reserve is needed.
        parameters: of the model, from :func:`parameters_of`, where they are known.
    """
    if parameters is None:
        parameters = parameters_of(recipe, meta_model(recipe, config))
    trained = peak_settings(
        parameters.items(), recipe.optimizer, qlip_groups(meta_model(recipe, config)), recipe.optimizer.parts
    )
    resident = _resident(recipe, parameters, trained, world, config.vision_config.image_size)
    estimate = MemoryEstimate(
        resident,
        _activations(recipe, config, samples_at_a_time(recipe, world), resident.get("bfloat16 copies", 0)),
        _passing(recipe, config, parameters, world),
        _update(recipe, parameters, trained, world),
    )
    return replace(estimate, reserve=GIB + estimate.peak // 20 if gpu else 0)


def meta_model(recipe: AnyRecipe, config: QLIPConfig) -> QLIPModel:
    """The model without its memory; parameters that do not train need no gradient."""
    with torch.device("meta"):
        model = QLIPModel(config)
    set_trainable(model, recipe)
    return model


def parameters_of(recipe: AnyRecipe, model: QLIPModel) -> dict[str, Tensor]:
    """The parameters that a rank loads: in stage 2 all but the text side's."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if isinstance(recipe, Stage1Recipe) or not name.startswith(("text_model.", "text_projection."))
    }


# -------------------------------------------------------------------- all the time


def _resident(
    recipe: AnyRecipe, parameters: dict[str, Tensor], trained: dict[str, ParamSettings], world: int, side: int
) -> dict[str, int]:
    shards = _shards(recipe, world)
    every, moving = _count(parameters.values()), _count(parameters[name] for name in trained)
    moments = sum(parameters[name].numel() * (1 if one.muon else 2) for name, one in trained.items())
    found = {
        "weights": FLOAT * every // shards,
        "gradients": FLOAT * moving // shards,
        f"{recipe.optimizer.name} state": FLOAT * moments // shards,
    }
    if recipe.ema is not None:
        found["moving average"] = FLOAT * moving // shards
    if recipe.precision == "bfloat16":
        found["bfloat16 copies"] = 2 * moving
    if isinstance(recipe, Stage2Recipe):
        if recipe.losses.alpha_p:
            found["perceptual network"] = FLOAT * VGG16_FEATURES
        if recipe.discriminator is not None:
            network = build_discriminator(recipe.discriminator, (side, side), seed=0)
            own = _count(network.parameters())
            found["discriminator"] = 4 * FLOAT * own // shards  # values, gradients, two moments
    return found


def _shards(recipe: AnyRecipe, world: int) -> int:
    """Ranks that share one copy of what is resident."""
    return min(recipe.parallel.shard or world, world) if recipe.parallel.kind == "fsdp" else 1


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# -------------------------------------------------------------------- in a step


def samples_at_a_time(recipe: AnyRecipe, world: int) -> int:
    """Samples that a rank holds at a time: the largest of its micro-batches."""
    share = -(-recipe.batch_size // world)
    return -(-share // number_of_micro_batches(recipe.batch_size, world, recipe.micro_batch_size))


_MEASURED: dict[str, int] = {}


def _activations(recipe: AnyRecipe, config: QLIPConfig, images: int, copies: int) -> int:
    """Activations of images held at a time, in proportion to a measured step of `IMAGES`.

    Recipes that differ in nothing that matters here share a measurement. ``copies``, the weights' bfloat16 copies, are
    in the measured bytes, and do not grow with the images.
    """
    parts: list[Any] = [recipe.task, recipe.precision, recipe.activation_checkpointing, recipe.losses]
    parts += [sorted(recipe.frozen_parts), getattr(recipe, "discriminator", None), config.to_json_dict()]
    key = repr(parts)
    if key not in _MEASURED:
        _MEASURED[key] = activation_bytes(recipe, config, IMAGES)
    return max(0, _MEASURED[key] - copies) * images // IMAGES


def _passing(recipe: AnyRecipe, config: QLIPConfig, parameters: dict[str, Tensor], world: int) -> dict[str, int]:
    found = {}
    if _shards(recipe, world) > 1:
        layers: dict[str, int] = {}
        for name, parameter in parameters.items():
            layer = name.partition(".layers.")[0] + name.partition(".layers.")[2].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + parameter.numel()
        found["gathered layers"] = 2 * FLOAT * max(layers.values())  # one computes, the next arrives
    if isinstance(recipe, Stage1Recipe) and recipe.aligned:
        rows = -(-recipe.batch_size // world)
        siglip = recipe.losses.align.kind == "siglip"
        columns = rows if siglip else recipe.batch_size  # a ring of ranks passes one rank's texts at a time
        chunk = min(rows, recipe.losses.align.chunk_size or rows)
        found["logits"] = LOGIT_TABLES * FLOAT * chunk * columns
        # both sides, with gradients; and all texts, with theirs
        found["embeddings"] = FLOAT * config.projection_dim * (4 * rows + 2 * columns)
    return found


def _update(recipe: AnyRecipe, parameters: dict[str, Tensor], trained: dict[str, ParamSettings], world: int) -> int:
    """LAMB makes an update and its denominators for a group of parameters at a time; Muon works shape by shape."""
    sizes: dict[object, int] = {}
    for name, one in trained.items():
        if recipe.optimizer.name == "lamb" or one.muon:
            key: object = tuple(parameters[name].shape) if one.muon else one
            sizes[key] = sizes.get(key, 0) + parameters[name].numel()
    largest = FLOAT * max(sizes.values(), default=0)
    # a matrix is whole on every rank: gathered, stacked, its iterate, the next one and their product
    return 2 * largest // _shards(recipe, world) if recipe.optimizer.name == "lamb" else 5 * largest
