"""Cost of a tokenizer's training per image: the stage's own network on tensors without memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlip.modeling import QLIPConfig, QLIPModel
from qlip.modeling.parts import TEXT_SIDE
from qlip.training.costs import count_flops, without_memory
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe
from qlip.training.tasks.stage1 import Stage1Network
from qlip.training.tasks.stage2 import Stage2Network, train_mode


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
