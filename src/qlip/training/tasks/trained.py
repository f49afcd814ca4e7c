"""What a recipe trains, decided once: the tasks go by it, and so do the dry run and its estimates."""

from __future__ import annotations

from torch import nn

from qlip.modeling import QLIPModel
from qlip.training.optim.param_groups import lock
from qlip.training.recipe import AnyRecipe, Stage2Recipe

CODES = "vision_model.quant_embed."
TRAINABLE = (CODES, "vision_model.quant_embed_post.", "vision_decoder.")
"""Prefixes of what stage 2 may move: the bottleneck's two sides and the decoder."""


def mark_trained(model: QLIPModel, recipe: AnyRecipe) -> None:
    """Leave a gradient to what trains and to nothing else.

    Stage 1 trains what its losses read; stage 2 the bottleneck's two sides (one, where codes are frozen) and the
    decoder. In either what the recipe locks does not train, nor a part whose rate is 0.

    Args:
        model: of any device, with or without its text side in stage 2.
        recipe: checked.
    """
    if isinstance(recipe, Stage2Recipe):
        moving = TRAINABLE[1:] if recipe.losses.freeze_codes else TRAINABLE
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(moving))
    else:
        unread: list[nn.Module | nn.Parameter] = []
        if not recipe.aligned:
            unread += [model.text_model, model.text_projection, model.visual_projection]
            unread += [model.vision_model.post_layernorm, model.logit_scale]
        if not recipe.rebuilds:
            unread.append(model.vision_decoder)
            if model.vision_model.quant_embed_post is not None:
                unread.append(model.vision_model.quant_embed_post)
        for one in unread:
            one.requires_grad_(False)
    lock(model, recipe.still)
