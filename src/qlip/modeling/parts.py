"""Parts of a model: the one place that says to which part a parameter belongs, and how an optimizer should treat it.

- `ParamGroups` is what training asks of any model: part, depth, matrix or not, decay or not, all by parameter name.
- `BlockGroups` answers for a model whose transformer layers are `Block` modules, from the modules themselves.
- `part_of` and the prefixes below are QLIP's own parts: encoder, text, decoder, and the bottleneck with the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from qlip.modeling.transformer import Block

Part = Literal["encoder", "text", "decoder", "bottleneck"]
"""Parts of a QLIP that may have a learning rate of their own; "bottleneck" is that and the rest (projections,
temperature), as in the paper's table of hyper-parameters."""
PARTS: tuple[Part, ...] = get_args(Part)

QUANT_EMBED, QUANT_EMBED_POST = "vision_model.quant_embed.", "vision_model.quant_embed_post."
DECODER = "vision_decoder."
TEXT_SIDE = ("text_model", "text_projection")
"""Modules that only text needs; stage 2 never loads them."""
CODE_PREFIXES = ("vision_model.embeddings.", "vision_model.encoder.", QUANT_EMBED)
"""Parameters that decide a model's codes."""
DECODER_PREFIXES = (QUANT_EMBED_POST, DECODER)
"""Parameters that turn codes into pixels."""

_PREFIXES: Mapping[str, Part] = {
    "vision_model.embeddings.": "encoder",
    "vision_model.encoder.": "encoder",
    "vision_model.post_layernorm.": "encoder",
    "text_model.": "text",
    DECODER: "decoder",
}
_TOWER = re.compile("(?:^|[.])(" + "|".join(re.escape(prefix) for prefix in _PREFIXES) + ")(.*)")


class ParamGroups(Protocol):
    """How a model's parameters are trained, by their names; supplied by the room of the model."""

    def part(self, name: str) -> str:
        """The part that may have a learning rate of its own."""
        ...

    def depth(self, name: str) -> int:
        """Distance from the output of the parameter's tower, in layers; 0 behind the last block (arXiv 2106.08254)."""
        ...

    def is_matrix(self, name: str) -> bool:
        """True for a weight matrix inside a block, which Muon may take."""
        ...

    def decays(self, name: str) -> bool:
        """True if weight decay applies: never to embeddings, norms and biases."""
        ...


class BlockGroups:
    """`ParamGroups` of a model of `Block` modules, read off its modules.

    The last block of a part is at depth 1, the first at the number of the part's blocks, embeddings one further, all
    else at 0. Matrices are the 2-D weights inside blocks. Tensors of two dimensions and more decay, except embeddings.

    Args:
        model: before or after sharding.
        part_of: name of a parameter to its part; by default the model is one part, "model".
        is_embedding: name of a parameter to whether it makes a tower's input, beside those of `nn.Embedding` modules.
    """

    def __init__(
        self,
        model: nn.Module,
        part_of: Callable[[str], str] = lambda name: "model",
        is_embedding: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._part_of = part_of
        parameters = dict(model.named_parameters())
        owners = dict(model.named_modules())
        embeddings = {name for name in parameters if isinstance(owners[name.rpartition(".")[0]], nn.Embedding)}
        embeddings |= {name for name in parameters if is_embedding(name)}
        blocks: dict[str, list[str]] = {}  # of each part, in the order of the model
        for prefix, module in owners.items():
            if isinstance(module, Block) and (first := next(iter(dict(module.named_parameters())), None)) is not None:
                blocks.setdefault(part_of(f"{prefix}.{first}"), []).append(f"{prefix}.")
        self._depths = {name: len(blocks.get(part_of(name), ())) + 1 for name in embeddings if part_of(name) in blocks}
        self._matrices: set[str] = set()
        for prefixes in blocks.values():
            for number, prefix in enumerate(prefixes):
                inside = [name for name in parameters if name.startswith(prefix) and name not in embeddings]
                self._depths |= dict.fromkeys(inside, len(prefixes) - number)
                self._matrices |= {name for name in inside if parameters[name].ndim == 2}
        self._decaying = {name for name, one in parameters.items() if one.ndim >= 2} - embeddings

    def part(self, name: str) -> str:
        """See `ParamGroups`."""
        return self._part_of(name)

    def depth(self, name: str) -> int:
        """See `ParamGroups`."""
        return self._depths.get(name, 0)

    def is_matrix(self, name: str) -> bool:
        """See `ParamGroups`."""
        return name in self._matrices

    def decays(self, name: str) -> bool:
        """See `ParamGroups`."""
        return name in self._decaying


def qlip_groups(model: nn.Module) -> BlockGroups:
    """How a :class:`~qlip.modeling.QLIPModel` is trained; patches, positions and [CLS] count as embeddings."""
    return BlockGroups(model, part_of, lambda name: "embedding" in name)


def part_of(name: str) -> Part:
    """Part of a parameter of a QLIP.

    Args:
        name: in :class:`~qlip.modeling.QLIPModel`, also behind the prefix of a module that holds it.

    Returns:
        ``bottleneck`` for all that is in no tower: ``quant_embed``, ``quant_embed_post``, both projections, the
        temperature and what a loss learns beside it, as in the paper's table ("bottleneck and the rest").
    """
    found = _TOWER.search(name)
    return "bottleneck" if found is None else _PREFIXES[found.group(1)]


def count_parameters(named: Iterable[tuple[str, Tensor]]) -> dict[Part, int]:
    """Number of parameters in each part, in the order of :data:`PARTS`."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in named:
        counts[part_of(name)] += parameter.numel()
    return counts


@torch.no_grad()
def renew(model: nn.Module, random: nn.Module, renewed: Callable[[str], bool]) -> None:
    """Give parameters of a trained model the values of a randomly initialised one.

    Args:
        model: to change.
        random: of the same architecture.
        renewed: parameter name to whether it is renewed.
    """
    values = dict(random.named_parameters())
    for name, parameter in model.named_parameters():
        if renewed(name):
            parameter.copy_(values[name])
