"""Cost of a tokenizer's training per image: the stage's own network on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qlip.data.loader.batch import Batch
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import Preprocessing, QLIPConfig, QLIPModel, QLIPProcessor
from qlip.modeling.parts import TEXT_SIDE
from qlip.training.costs import Run, count_flops, peak_bytes, without_memory
from qlip.training.task import Phase
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe
from qlip.training.tasks.stage1 import Stage1Network
from qlip.training.tasks.stage2 import Stage2, Stage2Network, train_mode


def empty_network(recipe: AnyRecipe, config: QLIPConfig) -> Stage1Network | Stage2Network:
    """The network of a recipe's stage; parameters that do not train need no gradient. Called `without_memory`."""
    model = QLIPModel(config)
    if isinstance(recipe, Stage1Recipe):
        set_trainable(model, recipe)
        return Stage1Network(model.train(), recipe.losses)
    for name in TEXT_SIDE:
        model.register_module(name, None)
    set_trainable(model, recipe)
    train_mode(model, scored=bool(recipe.losses.alpha_q or recipe.losses.commitment))
    return Stage2Network(model)


def run_network(network: nn.Module, config: QLIPConfig, images: int = 1) -> Mapping[str, Tensor]:
    """Run a stage's network on images of the trained size, each with a caption of the text tower's length."""
    side = config.vision_config.image_size
    pixels = torch.zeros(images, 3, side, side)
    if isinstance(network, Stage2Network):
        found: Mapping[str, Tensor] = network(pixels, True)
        return found
    ids = torch.zeros(images, config.text_config.max_position_embeddings, dtype=torch.int64)
    found = network(pixels, ids, True)
    return found


def flops_per_image(recipe: AnyRecipe, config: QLIPConfig) -> float:
    """Floating-point operations of one image and its caption, both passes, by the model alone."""
    with without_memory():
        network = empty_network(recipe, config)
        return count_flops(lambda: run_network(network, config))


def activation_bytes(recipe: AnyRecipe, config: QLIPConfig, images: int) -> int:
    """Most bytes of tensors in a step beside weights, gradients and optimizer state, for images held at a time.

    Losses over the whole batch are not in it. The batch's pixels are.
    """
    side = config.vision_config.image_size
    pixels = 4 * images * 3 * side**2
    with without_memory():
        if isinstance(recipe, Stage1Recipe):
            network = empty_network(recipe, config)
            network.model.set_activation_checkpointing(recipe.activation_checkpointing)
            _with_gradients(network.parameters())
            return pixels + peak_bytes(_in_precision(recipe, lambda: run_network(network, config, images)))
        return pixels + max(peak_bytes(run) for run in _stage2_runs(recipe, config, images))


class _OnePass(Stage2):
    """Stage 2 whose discriminator sees images rebuilt in one pass: indices without memory have no values to check."""

    @torch.no_grad()
    def pair(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Stage2.pair`."""
        return self.signed(pixel_values), self.signed(self.model(pixel_values=pixel_values).reconstructions)


def _stage2_runs(recipe: Stage2Recipe, config: QLIPConfig, images: int) -> list[Run]:
    """Each phase of stage 2, with LPIPS and the discriminator, on a batch of zeros."""
    side = config.vision_config.image_size
    model = QLIPModel(config)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    processor = QLIPProcessor(Preprocessing((side, side), side, patch_size=config.vision_config.patch_size), None)
    task = _OnePass(model, processor, recipe, perceptual=LPIPS() if recipe.losses.alpha_p else None)
    if (discriminator := recipe.discriminator) is not None:
        task.before_step(discriminator.start + discriminator.warmup)
    zeros = torch.zeros(images, dtype=torch.int64)
    batch = Batch(
        torch.zeros(images, 3, side, side), zeros[:, None], zeros.bool(), zeros, [""] * images, [None] * images
    )
    for phase in task.phases:
        _with_gradients(phase.parameters)
    return [_in_precision(recipe, _forward(phase, batch)) for phase in task.phases]


def _forward(phase: Phase, batch: Batch) -> Run:
    def run() -> Mapping[str, Tensor]:
        inputs = phase.forward(batch, False)
        return inputs.sums | inputs.mean_stats

    return run


def _in_precision(recipe: AnyRecipe, run: Run) -> Run:
    def cast() -> Mapping[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            return run()

    return cast


def _with_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters that train a gradient, so that it is not counted as new."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
