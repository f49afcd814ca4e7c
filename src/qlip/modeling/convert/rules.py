"""Rules by which a tower's tensors in a source's file become a QLIP's parameters.

A `Format` is one project's way to name a tower; the modules eva, open_clip and qlip define them. Its `Rules` are one
table: a pattern of the source's names, and the parameters that such a tensor becomes, or `Drop` with the reason why it
is left out. A `Tower` is what one file holds for one part of a QLIP: its tensors under a QLIP's names, a report `Row`
for each key of the file that a rule matched, and the facts of its architecture.

In patterns ``{n}`` is a layer's number, ``{p}`` is weight or bias, ``{rest}`` is any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.convert.report import Row
from qlip.modeling.convert.weights_file import Source

Part = Literal["vision", "text"]

ROOTS: dict[Part, str] = {"vision": "vision_model.", "text": "text_model."}
PROJECTIONS: dict[Part, str] = {"vision": "visual_projection.", "text": "text_projection."}
NAMES: dict[Part, str] = {"vision": "image tower", "text": "text tower"}

CLASS_TOKEN = "vision_model.embeddings.class_embedding"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_model.embeddings.patch_embedding.weight"

HEAD_WIDTH = 64
"""Head width of every tower that these projects publish, except those of `_OTHER_HEADS`."""

_OTHER_HEADS: dict[tuple[Part, int], int] = {("vision", width): 16 for width in (1280, 1408, 1664, 1792)}
"""Number of heads by part and width: image towers of the sizes H, g, G and E have 16."""

_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Drop:
    """A source's tensor that a QLIP does not take.

    Attributes:
        reason: shown in the report, or in the error.
        refused: True if the tower would compute something else without the tensor: the file is refused.
    """

    reason: str
    refused: bool = False


@dataclass(frozen=True)
class Transposed:
    """A source's matrix that a QLIP stores transposed.

    Attributes:
        target: the parameter.
    """

    target: str


Rules = Mapping[str, str | tuple[str, ...] | Transposed | Drop]
"""Patterns of a source's names, without prefix, in the order of the search; the first match counts.

Each becomes one parameter, or several where the tensor is split evenly along its first dimension.
"""


def qkv(layer: str, leaf: str) -> tuple[str, ...]:
    """Parameters that a fused ``qkv`` tensor is split into."""
    return tuple(f"{layer}self_attn.{name}_proj.{leaf}" for name in "qkv")


@dataclass(frozen=True)
class Format:
    """One project's way to name a tower.

    Attributes:
        part: the QLIP's part that the tower becomes.
        name: shown in the report and in errors.
        prefixes: what may stand before every name of the tower, the longest first.
        anchors: names that identify the format, without prefix.
        rules: of all its variants.
        read_facts: fills in a tower's facts and notes from its tensors; raises QLIPError for impossible shapes.
        variant: from a file's tensors and the prefix: what follows the name, and rules beside ``rules`` or instead of
            some, of the variant that the file holds.
        own: True for a QLIP checkpoint, whose config holds all facts.
    """

    part: Part
    name: str
    prefixes: tuple[str, ...]
    anchors: tuple[str, ...]
    rules: Rules
    read_facts: Callable[[Tower], None]
    variant: Callable[[Mapping[str, Tensor], str], tuple[str, Rules]] = lambda tensors, prefix: ("", {})
    own: bool = False

    def prefix_in(self, keys: Collection[str]) -> str | None:
        """The prefix under which a file holds this format, or None if it does not."""
        found = (prefix for prefix in self.prefixes if all(prefix + anchor in keys for anchor in self.anchors))
        return next(found, None)


@dataclass
class Tower:
    """Content of a file for one part of a QLIP.

    Attributes:
        source: the file.
        format: its naming scheme; ``prefix`` stands before every name.
        kind: the format's name with the variant.
        rules: the format's for this variant.
        tensors: float32 tensors by parameter name, in a QLIP's orientation, not yet resampled.
        rows: report rows of the keys that a rule matched.
        facts: config fields as far as the file shows them; ``num_attention_heads`` is None where it does not.
        notes: assumptions, one line each.
        patch_size: pixels per patch side, of an image tower.
        grid: patches per image side, of an image tower.
        projection_dim: width of the shared space; None without a projection.
        projection_bias: True if the projection has a bias.
    """

    source: Source
    format: Format
    prefix: str
    kind: str
    rules: Rules
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    patch_size: int = 0
    grid: int = 0
    projection_dim: int | None = None
    projection_bias: bool = False

    @property
    def part(self) -> Part:
        """The QLIP's part that the tower becomes."""
        return self.format.part

    @property
    def conventional_heads(self) -> int | None:
        """Number of heads that published towers of this width have; None for a width that none has."""
        width = int(self.facts["hidden_size"])
        return _OTHER_HEADS.get((self.part, width), width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)

    def sort_keys(self) -> None:
        """Take or drop every key with the tower's prefix that a rule matches.

        Raises:
            QLIPError: a key that must not be dropped, a parameter given twice, or a tensor of an impossible shape.
        """
        file = self.source.name
        for key, tensor in self.source.tensors.items():
            if not key.startswith(self.prefix):
                continue
            name = key.removeprefix(self.prefix)
            matches = ((rule, found) for pattern, rule in self.rules.items() if (found := match(pattern, name)))
            rule, found = next(matches, (None, None))
            if rule is None or found is None:
                continue
            if isinstance(rule, Drop):
                if rule.refused:
                    raise QLIPError(f"{file}: {key!r}: {rule.reason}; choose another tower")
                self.rows.append(Row("dropped", file, (key,), (), rule.reason))
                continue
            names = tuple(fill(target, found) for target in targets(rule))
            for name in names:
                if name in self.tensors:
                    raise QLIPError(f"{file}: {self.key_of(name)!r} and {key!r} are the same parameter; leave one out")
            how = f"split in {len(names)}" if len(names) > 1 else "transposed" if isinstance(rule, Transposed) else ""
            self.tensors |= zip(names, oriented(file, key, tensor, rule), strict=True)
            self.rows.append(Row("mapped", file, (key,), names, how))

    def read_common_facts(self, eps: float) -> None:
        """Fill in the facts that the names and shapes of the first block show, and the norms' epsilon."""
        root, tensors = ROOTS[self.part] + "encoder.layers.", self.tensors
        layers = {int(found[1]) for name in tensors if (found := re.match(re.escape(root) + r"(\d+)\.", name))}
        first = root + "0."
        swiglu = first + "mlp.w1.weight" in tensors
        inner, width = self.shape_of(first + ("mlp.w1.weight" if swiglu else "mlp.fc1.weight"), 2)
        self.facts = {
            "hidden_size": width,
            "num_hidden_layers": 1 + max(layers),
            "intermediate_size": inner,
            "num_attention_heads": None,
            "swiglu": swiglu,
            "subln": first + "mlp.ffn_ln.weight" in tensors,
            **{f"{name}_bias": f"{first}self_attn.{name}_proj.bias" in tensors for name in "qkv"},
            "layer_norm_eps": eps,
        }

    def read_projection(self) -> None:
        """Fill in the width and bias of the projection."""
        projection = PROJECTIONS[self.part]
        if projection + "weight" in self.tensors:
            self.projection_dim = self.shape_of(projection + "weight", 2)[0]
        self.projection_bias = projection + "bias" in self.tensors

    def key_of(self, target: str) -> str:
        """The source's key of a parameter that it fills."""
        return next(row.source_keys[0] for row in self.rows if target in row.target_keys)

    def shape_of(self, target: str, dims: int) -> tuple[int, ...]:
        """The shape of a parameter. Raises QLIPError if the file lacks it, or it has another number of dimensions."""
        tensor = self.tensors.get(target)
        if tensor is None:
            raise self.missing(target)
        if tensor.dim() != dims:
            key = self.key_of(target)
            raise QLIPError(f"{self.source.name}: tensor {key!r} has {tensor.dim()} dimensions, expected {dims}")
        return tuple(tensor.shape)

    def missing(self, target: str) -> QLIPError:
        """The error for a parameter that the source lacks, by the source's name for it."""
        keys = [key.removeprefix(self.prefix) for row in self.rows for key in row.source_keys]
        names = {
            fill(pattern, found): any(match(pattern, key) for key in keys)
            for pattern, rule in self.rules.items()
            for name in targets(rule)
            if (found := match(name, target))
        }
        likely = max(names, key=names.__getitem__, default=None)  # the first that other layers go by, or the first
        name = target if likely is None else self.prefix + likely
        return QLIPError(f"{self.source.name}: not a whole {self.kind}: it holds no {name!r}; fetch the file again")


def targets(rule: str | tuple[str, ...] | Transposed | Drop) -> tuple[str, ...]:
    """Parameters that a rule fills."""
    if isinstance(rule, Drop):
        return ()
    if isinstance(rule, Transposed):
        return (rule.target,)
    return (rule,) if isinstance(rule, str) else rule


def oriented(file: str, key: str, tensor: Tensor, rule: str | tuple[str, ...] | Transposed) -> list[Tensor]:
    """Float32 tensors in a QLIP's orientation, one per target. Raises QLIPError for an impossible shape or type."""

    def wrong(expected: str) -> QLIPError:
        return QLIPError(f"{file}: tensor {key!r} has shape {tuple(tensor.shape)}, expected {expected}")

    if not tensor.is_floating_point():
        raise QLIPError(f"{file}: tensor {key!r} is {tensor.dtype}, not floating point; save it dequantised")
    tensor = tensor.float()
    match rule:
        case tuple():
            if not tensor.dim() or tensor.shape[0] % len(rule) or not tensor.numel():
                raise wrong(f"{len(rule)} equal parts")
            return list(tensor.chunk(len(rule)))
        case Transposed():
            if tensor.dim() != 2:
                raise wrong("a matrix")
            return [tensor.t()]
        case str() if rule == CLASS_TOKEN:
            return [tensor.flatten()]
        case str() if rule == POSITIONS:
            if tensor.dim() < 2:
                raise wrong("a vector per position")
            return [tensor.flatten(0, -2)]  # (1, positions, D) -> (positions, D)
        case str() if rule == PATCHES:
            if tensor.dim() != 4 or tensor.shape[2] != tensor.shape[3]:
                raise wrong("(width, channels, patch, patch)")
    return [tensor]


def match(pattern: str, key: str) -> re.Match[str] | None:
    """Match the whole key against a pattern; the groups fill the same placeholders elsewhere."""
    return _compiled(pattern).fullmatch(key)


def fill(pattern: str, found: re.Match[str]) -> str:
    """A pattern with a match's placeholders filled in."""
    return pattern.format_map(found.groupdict())


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for placeholder, group in _PLACEHOLDERS.items():
        expression = expression.replace(re.escape(placeholder), group)
    return re.compile(expression)
