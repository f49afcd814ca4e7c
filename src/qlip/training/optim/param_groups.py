"""The parts of a QLIP that may be trained apart: encoder, text, decoder, and the bottleneck with the rest."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qlip.training.recipe_schema import Part

PARTS: tuple[Part, ...] = ("encoder", "text", "decoder", "bottleneck")

_PREFIXES: Mapping[str, Part] = {
    "vision_model.embeddings.": "encoder",
    "vision_model.encoder.": "encoder",
    "vision_model.post_layernorm.": "encoder",
    "text_model.": "text",
    "vision_decoder.": "decoder",
}
_TOWER = re.compile("(?:^|[.])(" + "|".join(re.escape(prefix) for prefix in _PREFIXES) + ")(.*)")
_LAYER = re.compile(r"(?:^|[.])encoder[.]layers[.](\d+)[.]")


def part_of(name: str) -> Part:
    """Which part a parameter belongs to.

    Args:
        name: in :class:`~qlip.modeling.QLIPModel`, also behind the prefix of a module that holds it.

    Returns:
        ``bottleneck`` for all that is in no tower: ``quant_embed``, ``quant_embed_post``, both projections, the
        temperature and what a loss learns beside it, as in the paper's table ("bottleneck and the rest").
    """
    found = _TOWER.search(name)
    return "bottleneck" if found is None else _PREFIXES[found.group(1)]


@dataclass(frozen=True)
class Depths:
    """How far a parameter is from its tower's output, in layers (arXiv 2106.08254, appendix).

    What follows the blocks (norms, the decoder's output layers) is at 0, the last block at 1, the first at the number
    of blocks, and embeddings one further. The bottleneck and the rest are at 0.

    Attributes:
        blocks: number of blocks of each part.
    """

    blocks: Mapping[Part, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Depths:
        """Count the blocks in the names of a model's parameters."""
        blocks: dict[Part, int] = {}
        for name in names:
            if (number := _LAYER.search(name)) is not None:
                part = part_of(name)
                blocks[part] = max(blocks.get(part, 0), int(number.group(1)) + 1)
        return cls(blocks)

    def __getitem__(self, name: str) -> int:
        """Distance of a parameter, by name."""
        blocks = self.blocks.get(part_of(name), 0)
        if (number := _LAYER.search(name)) is not None:
            return blocks - int(number.group(1))
        return blocks + 1 if blocks and is_embedding(name) else 0


def is_embedding(name: str) -> bool:
    """Whether a parameter makes a tower's input: patches, tokens, positions, [CLS]."""
    return "embedding" in name


def lock(model: nn.Module, parts: Collection[Part]) -> None:
    """Take parts out of training: their parameters need no gradient (a locked tower, arXiv 2111.07991)."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def count_parameters(named: Iterable[tuple[str, Tensor]]) -> dict[Part, int]:
    """Numbers in each part, in the order of :data:`PARTS`."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in named:
        counts[part_of(name)] += parameter.numel()
    return counts
