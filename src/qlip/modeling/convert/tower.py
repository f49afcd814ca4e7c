"""A tower taken out of a weights file: its tensors under a QLIP's names, and what is known of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.convert.layouts import Drop, Layout, Part, Rule, fill, match
from qlip.modeling.convert.reading import Source
from qlip.modeling.convert.report import Row

ROOTS: dict[Part, str] = {"vision": "vision_model.", "text": "text_model."}
PROJECTIONS: dict[Part, str] = {"vision": "visual_projection.", "text": "text_projection."}
NAMES: dict[Part, str] = {"vision": "image tower", "text": "text tower"}

HEAD_WIDTH = 64
"""Of every tower these projects publish, but for those of `_OTHER_HEADS`."""

_OTHER_HEADS = {1408: 16, 1792: 16}


@dataclass(frozen=True)
class Taken:
    """A source's tensor in a QLIP's orientation, not yet resampled.

    Attributes:
        key: of the source.
        rule: what it went through.
        parts: float32 tensors by parameter name.
    """

    key: str
    rule: Rule
    parts: dict[str, Tensor]


@dataclass
class Tower:
    """What a file holds for one part of a QLIP.

    Attributes:
        part: of the QLIP.
        source: the file.
        layout: how it names things; ``prefix`` before every name.
        kind: the layout in words, with what could be read of the variant.
        entries: the layout's rules for this variant.
        taken: tensors that have a place.
        rows: keys that have none.
        facts: the tower's config fields as far as the file says them; ``num_attention_heads`` only where it does.
        notes: what was assumed.
        patch_size, grid: of an image tower.
        projection_dim: width of the shared space, None without a projection.
        projection_bias: whether the projection has one.
        asked_activation: the activation is not in the file and was chosen.
    """

    part: Part
    source: Source
    layout: Layout
    prefix: str
    kind: str
    entries: Sequence[Rule | Drop]
    taken: list[Taken] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    patch_size: int = 0
    grid: int = 0
    projection_dim: int | None = None
    projection_bias: bool = False
    asked_activation: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By parameter name."""
        return {name: tensor for taken in self.taken for name, tensor in taken.parts.items()}

    @property
    def conventional_heads(self) -> int | None:
        """What towers of this width have, None for a width that no published tower has."""
        width = int(self.facts["hidden_size"])
        return _OTHER_HEADS.get(width, width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)

    def missing(self, target: str) -> QLIPError:
        """The error of a parameter that the source should hold, by the source's name for it."""
        rules = [entry for entry in self.entries if isinstance(entry, Rule)]
        used = {taken.rule for taken in self.taken}
        names = (
            self.prefix + fill(rule.source, found)
            for rule in sorted(rules, key=lambda rule: rule not in used)  # one that other layers of the file go by
            for pattern in rule.targets
            if (found := match(pattern, target)) is not None
        )
        return QLIPError(
            f"{self.source.name}: not a whole {self.kind}: it holds no {next(names, target)!r}; fetch the file again"
        )

    def sizes(self, target: str, dims: int) -> tuple[int, ...]:
        """The shape of a parameter that must be there. Raises QLIPError where it is not, or has other dimensions."""
        tensor = self.tensors.get(target)
        if tensor is None:
            raise self.missing(target)
        if tensor.dim() != dims:
            raise QLIPError(
                f"{self.source.name}: tensor {self.key_of(target)!r} has {tensor.dim()} dimensions, expected {dims}"
            )
        return tuple(tensor.shape)

    def key_of(self, target: str) -> str:
        """The source's name of a parameter that it holds."""
        return next(taken.key for taken in self.taken if target in taken.parts)
