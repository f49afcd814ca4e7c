"""How much memory a rank needs: an estimate from the recipe and the architecture; nothing large is allocated.

- **resident**: of each parameter 4 bytes its value and, if it trains, 4 its gradient, 8 its moments (4 with Muon) and 4
  its average; with ``fsdp`` divided by the ranks that share a copy. Under autocast 2 more for the copy of a weight
  that products take, which is shared by no one.
- **activations**: see :mod:`qlip.training.activations`, for a micro-batch, every image with words.
- **passing**, for a moment beside the activations: the layers that ``fsdp`` gathers, a chunk of the table of logits,
  gathered embeddings.
- **update**: what an optimizer's step needs for itself when activations are gone.
- **reserve**, on a GPU: its context, libraries' workspaces, what an allocator cannot use: 1 GiB and a twentieth.

tests/training/test_memory.py holds it against measured runs: within a quarter of the activations, exact for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from qlip.modeling import QLIPConfig, QLIPModel
from qlip.modeling.parts import Part, part_of, qlip_groups
from qlip.training.activations import (
    FLOAT,
    LPIPS_PIXEL,
    Bytes,
    bottleneck_bytes,
    decoder_bytes,
    encoder_bytes,
    graph_bytes,
    judged_bytes,
    text_bytes,
)
from qlip.training.batches import number_of_micro_batches
from qlip.training.optim.optimizers import ParamSettings, peak_settings
from qlip.training.tasks.discriminators import build_discriminator
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe
from qlip.training.tasks.recipe_schema import DiscriminatorSection

GIB = 2**30
VGG16_FEATURES = 14_716_160
"""Parameters of the perceptual network: VGG16's convolutions and the five weightings of their channels."""
LOGIT_TABLES = 5
"""Tables that exist at once for a chunk: the logits, as rows, as columns, targets, errors."""
PROBE = 128
"""Side of the image on which a discriminator is tried."""


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
        """What a device must have."""
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
    estimate = MemoryEstimate(
        _resident(recipe, parameters, trained, world, config.vision_config.image_size),
        _activations(recipe, config, {part_of(name) for name in trained}) * samples_at_a_time(recipe, world),
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
            own, _ = discriminator_needs(recipe.discriminator, side)
            found["discriminator"] = 4 * FLOAT * own // shards  # values, gradients, two moments
    return found


@cache
def discriminator_needs(settings: DiscriminatorSection, side: int) -> tuple[int, float]:
    """Parameters of a discriminator, and bytes a pixel that its graph keeps of an image, in float32.

    It is made and run on a small image: it is not large, and comes in many kinds.

    Args:
        settings: of the recipe.
        side: of the images.
    """
    network = build_discriminator(settings, (side, side), seed=0)
    probe = side if side <= PROBE else max(PROBE, side // 4)
    picture = torch.zeros(1, 3, probe, probe, requires_grad=True)
    kept = graph_bytes(lambda: network(picture), [*network.parameters(), picture])
    return _count(network.parameters()), kept / probe**2


def _shards(recipe: AnyRecipe, world: int) -> int:
    """Ranks that share one copy of what is resident."""
    return min(recipe.parallel.shard or world, world) if recipe.parallel.kind == "fsdp" else 1


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# -------------------------------------------------------------------- in a step


def compute_bytes(recipe: AnyRecipe) -> int:
    """Bytes of a number in products."""
    return 2 if recipe.precision == "bfloat16" else FLOAT


def samples_at_a_time(recipe: AnyRecipe, world: int) -> int:
    """Samples that a rank holds at a time: the largest of its micro-batches."""
    share = -(-recipe.batch_size // world)
    return -(-share // number_of_micro_batches(recipe.batch_size, world, recipe.micro_batch_size))


def _activations(recipe: AnyRecipe, config: QLIPConfig, training: set[Part]) -> int:
    """Most of one sample, in the order in which the networks run."""
    compute, checkpointing = compute_bytes(recipe), recipe.activation_checkpointing
    one = encoder_bytes(config, compute, checkpointing, frozen="encoder" not in training)
    if training & {"encoder", "bottleneck"}:
        one += bottleneck_bytes(config, compute)
    if isinstance(recipe, Stage2Recipe):
        return _second_stage(recipe, config, one + decoder_bytes(config, compute, checkpointing))
    if recipe.rebuilds:
        one += decoder_bytes(config, compute, checkpointing)
    if recipe.aligned:
        one += text_bytes(config, compute, checkpointing, frozen="text" not in training)
    return one.peak


def _second_stage(recipe: Stage2Recipe, config: QLIPConfig, rebuilding: Bytes) -> int:
    """The decoder's graph is kept while one judge after the other looks; then the discriminator sees both images."""
    side = config.vision_config.image_size
    one, second = rebuilding, 0
    if recipe.losses.alpha_p:
        one += judged_bytes(side, LPIPS_PIXEL)
    if recipe.discriminator is not None:
        _, pixel = discriminator_needs(recipe.discriminator, side)
        one += judged_bytes(side, 1.1 * pixel)
        passes = 4 if recipe.discriminator.r1 else 2  # the penalty's gradient has a graph of its own
        second = 2 * judged_bytes(side, 0).kept + round(1.1 * passes * pixel * side**2)
    return max(one.peak, second)


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
