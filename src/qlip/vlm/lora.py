"""Low-rank adapters of the text decoder (arXiv 2106.09685): W x + alpha / rank B A x.

The package peft puts them in for training (`add`). A folder of a vision-language model keeps them beside the projector,
as its configuration's `Adapters` describe them, and loading it adds them to the decoder's weights (`merge`), for which
peft is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError, require
from qlip.modeling.config import Config, Positive

_SIDES = ("lora_A.default.weight", "lora_B.default.weight")
"""Names of the two matrices below an adapted layer, as peft has them."""


class Adapters(Config):
    """Adapters in the folder of a vision-language model.

    Attributes:
        rank, alpha: of all of them.
        modules: adapted linear layers, by their names in the text decoder.
    """

    rank: Positive
    alpha: float
    modules: tuple[str, ...]

    def shapes(self, llm: nn.Module) -> dict[str, torch.Size]:
        """Names and shapes of their matrices for a text decoder.

        Raises:
            QLIPError: the decoder has no such layer.
        """
        found: dict[str, torch.Size] = {}
        layers = dict(llm.named_modules())
        for name in self.modules:
            layer = layers.get(name)
            if not isinstance(layer, nn.Linear):
                raise QLIPError(
                    f"lora: the text decoder has no linear layer {name!r}; take the decoder it was made for"
                )
            found[f"{name}.{_SIDES[0]}"] = torch.Size((self.rank, layer.in_features))
            found[f"{name}.{_SIDES[1]}"] = torch.Size((layer.out_features, self.rank))
        return found


def add(llm: nn.Module, pattern: str, rank: int, alpha: float, dropout: float) -> Adapters:
    """Put adapters into a text decoder; they alone train.

    Args:
        llm: text decoder, changed in place.
        pattern: regular expression that matches the whole names of the linear layers to adapt.
        rank, alpha, dropout: of the adapters.

    Raises:
        QLIPError: peft is not installed, or no layer matches.
    """
    inside = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in inside if name.startswith("layers.")]  # the loss reads the output layer's weight itself
    modules = tuple(name for name in linear if re.fullmatch(pattern, name))
    if not modules:
        raise QLIPError(
            f"lora.targets {pattern!r}: matches none of the {len(linear)} linear layers in the text decoder's blocks,"
            f" such as {linear[0]!r}"
        )
    peft = require("peft", extra="lora")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(modules))
    peft.inject_adapter_in_model(config, llm)
    return Adapters(rank=rank, alpha=alpha, modules=modules)


@torch.no_grad()
def merge(llm: nn.Module, adapters: Adapters, matrices: Mapping[str, Tensor]) -> None:
    """Add adapters to the weights of a plain text decoder.

    Args:
        llm: changed in place.
        adapters: their description.
        matrices: by the names of `Adapters.shapes`.
    """
    layers = dict(llm.named_modules())
    for name in adapters.modules:
        down, up = (matrices[f"{name}.{side}"] for side in _SIDES)
        weight: Tensor = layers[name].weight
        weight += (up @ down * (adapters.alpha / adapters.rank)).to(weight.dtype)
