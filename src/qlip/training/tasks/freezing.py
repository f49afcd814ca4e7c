"""Which parameters a recipe trains, decided in one place: tasks and the dry run call :func:`set_trainable`."""

from __future__ import annotations

from torch import nn

from qlip.modeling import QLIPModel
from qlip.modeling.parts import DECODER_PREFIXES, QUANT_EMBED, part_of
from qlip.training.tasks.recipe import AnyRecipe, Stage2Recipe


def set_trainable(model: QLIPModel, recipe: AnyRecipe) -> None:
    """Set ``requires_grad`` of what trains, and of nothing else.

    Stage 1 trains what its losses read; stage 2 the bottleneck's two sides (one, where codes are frozen) and the
    decoder. In both, locked parts and parts of rate 0 do not train.

    Args:
        model: on any device, with or without its text side in stage 2.
        recipe: checked.
    """
    if isinstance(recipe, Stage2Recipe):
        moving = trained_in_stage2(recipe.losses.freeze_codes)
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
    for name, parameter in model.named_parameters():
        if part_of(name) in recipe.frozen_parts:
            parameter.requires_grad_(False)


def trained_in_stage2(freeze_codes: bool = False) -> tuple[str, ...]:
    """Prefixes of the parameters that stage 2 may move."""
    return DECODER_PREFIXES if freeze_codes else (QUANT_EMBED, *DECODER_PREFIXES)
