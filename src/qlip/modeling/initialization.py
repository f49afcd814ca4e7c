"""Random initial weights.

The initialisation of a QLIP from scratch is not published; this is CLIP's scheme (arXiv 2103.00020): standard
deviations follow widths, and layers that write to the residual stream shrink with depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qlip.modeling.transformer import Encoder, GeluMLP, Layer, SwiGLU

if TYPE_CHECKING:
    from qlip.modeling.model import QLIPModel


def initialize_layer(module: nn.Module) -> None:
    """Initialise a linear layer or a norm in place; other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def initialize(model: QLIPModel) -> None:
    """Initialise all parameters in place, except the temperature."""
    for module in model.modules():
        initialize_layer(module)
    for module in model.modules():
        if isinstance(module, Encoder):
            _shrink_residual_writers(module)
    vision = model.vision_model.embeddings
    patch = vision.patch_embedding
    nn.init.normal_(patch.weight, std=(patch.in_channels * vision.patch_size**2) ** -0.5)
    if patch.bias is not None:
        nn.init.zeros_(patch.bias)
    for table in (vision.class_embedding, vision.position_embedding.weight, model.vision_decoder.position_embeddings):
        nn.init.normal_(table, std=0.02)
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.01)


def _shrink_residual_writers(encoder: Encoder) -> None:
    """Scale layers that add to the residual stream by (2 * depth)^-0.5: its variance then does not grow with depth."""
    scale = (2 * len(encoder.layers)) ** -0.5
    for layer in encoder.layers:
        assert isinstance(layer, Layer)
        mlp = layer.mlp
        assert isinstance(mlp, GeluMLP | SwiGLU)
        last = mlp.w3 if isinstance(mlp, SwiGLU) else mlp.fc2
        for linear in (layer.self_attn.out_proj, last):
            linear.weight.data.mul_(scale)
