"""Rules by which a tower's tensors in a source's file become a QLIP's parameters.

A `Format` is one project's way to name a tower; the modules eva, open_clip and qlip define them. Its `Rule`s say which
parameters a tensor becomes, its `Drop`s which tensors are left out and why. A `Tower` is what one file holds for one
part of a QLIP: its tensors under a QLIP's names (`Taken`), the keys left out, and the facts of its architecture.

In patterns ``{n}`` is a layer's number, ``{p}`` is weight or bias, ``{rest}`` is any text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.convert.report import Row
from qlip.modeling.convert.weights_file import Source

Part = Literal["vision", "text"]
How = Literal["", "split", "transposed", "flattened", "positions", "patches"]

ROOTS: dict[Part, str] = {"vision": "vision_model.", "text": "text_model."}
PROJECTIONS: dict[Part, str] = {"vision": "visual_projection.", "text": "text_projection."}
NAMES: dict[Part, str] = {"vision": "image tower", "text": "text tower"}

HEAD_WIDTH = 64
"""Head width of every tower that these projects publish, except those of `_OTHER_HEADS`."""

_OTHER_HEADS: dict[tuple[Part, int], int] = {("vision", width): 16 for width in (1280, 1408, 1664, 1792)}
"""Number of heads by part and width: image towers of the sizes H, g, G and E have 16."""

_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Rule:
    """A source's tensor and the parameters that it becomes.

    Attributes:
        source: pattern of the key, without the format's prefix.
        targets: a QLIP's parameters; several where the tensor is split evenly along its first dimension.
        how: the operation on the tensor.
    """

    source: str
    targets: tuple[str, ...]
    how: How = ""


@dataclass(frozen=True)
class Drop:
    """A source's tensor that a QLIP does not take.

    Attributes:
        source: pattern of the key, without the format's prefix.
        reason: shown in the report, or in the error.
        refused: True if the tower would compute something else without the tensor: the file is refused.
    """

    source: str
    reason: str
    refused: bool = False


Entries = tuple[Rule | Drop, ...]


def block_rules(source: str, target: str, names: Mapping[str, str]) -> Iterator[Rule]:
    """Rules of one block: names inside the source's block to names inside the QLIP's."""
    return (Rule(source + theirs, (target + ours,)) for theirs, ours in names.items())


def qkv(layer: str, leaf: str) -> tuple[str, ...]:
    """Parameters that a fused ``qkv`` tensor is split into."""
    return tuple(f"{layer}self_attn.{name}_proj.{leaf}" for name in "qkv")


class Format:
    """One project's way to name a tower.

    Attributes:
        part: the QLIP's part that the tower becomes.
        name: shown in the report and in errors.
        prefixes: what may stand before every name of the tower, the longest first.
        anchors: names that identify the format, without prefix.
        entries: rules and drops; the first match counts.
        eps: epsilon of the norms, which no file holds.
        own: True for a QLIP checkpoint, whose config holds all facts.
    """

    part: Part
    name: str
    prefixes: tuple[str, ...]
    anchors: tuple[str, ...]
    entries: Entries
    eps: float = 1e-5
    own: bool = False

    def prefix_in(self, keys: Collection[str]) -> str | None:
        """The prefix under which a file holds this format, or None if it does not."""
        found = (prefix for prefix in self.prefixes if all(prefix + anchor in keys for anchor in self.anchors))
        return next(found, None)

    def variant(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, Entries]:
        """Name and entries of the format's variant that a file holds."""
        return self.name, self.entries

    def read_facts(self, tower: Tower) -> None:
        """Fill in ``tower.facts`` and ``tower.notes`` from its tensors. Raises QLIPError for impossible shapes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Taken:
    """A source's tensor in a QLIP's orientation, not yet resampled.

    Attributes:
        key: name in the source.
        rule: the rule that matched.
        parts: float32 tensors by parameter name.
    """

    key: str
    rule: Rule
    parts: dict[str, Tensor]


@dataclass
class Tower:
    """Content of a file for one part of a QLIP.

    Attributes:
        source: the file.
        format: its naming scheme; ``prefix`` stands before every name.
        kind: the format's name with the variant.
        entries: the format's rules for this variant.
        taken: tensors that become parameters.
        rows: report rows of the keys that do not.
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
    entries: Sequence[Rule | Drop]
    taken: list[Taken] = field(default_factory=list)
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
    def tensors(self) -> dict[str, Tensor]:
        """Float32 tensors by parameter name."""
        return {name: tensor for taken in self.taken for name, tensor in taken.parts.items()}

    @property
    def conventional_heads(self) -> int | None:
        """Number of heads that published towers of this width have; None for a width that none has."""
        width = int(self.facts["hidden_size"])
        return _OTHER_HEADS.get((self.part, width), width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)

    def sort_keys(self) -> None:
        """Take or drop every key with the tower's prefix that an entry matches.

        Raises:
            QLIPError: a key that must not be dropped, a parameter given twice, or a tensor of an impossible shape.
        """
        given: dict[str, str] = {}
        for key, tensor in self.source.tensors.items():
            if not key.startswith(self.prefix):
                continue
            name = key.removeprefix(self.prefix)
            matches = ((entry, found) for entry in self.entries if (found := match(entry.source, name)) is not None)
            entry, found = next(matches, (None, None))
            if isinstance(entry, Drop):
                if entry.refused:
                    raise QLIPError(f"{self.source.name}: {key!r}: {entry.reason}; choose another tower")
                self.rows.append(Row("dropped", self.source.name, (key,), (), entry.reason))
            elif entry is not None and found is not None:
                targets = [fill(target, found) for target in entry.targets]
                for target in targets:
                    if target in given:
                        raise QLIPError(
                            f"{self.source.name}: {given[target]!r} and {key!r} are the same parameter; leave one out"
                        )
                    given[target] = key
                parts = as_parameters(self.source.name, key, tensor, entry)
                self.taken.append(Taken(key, entry, dict(zip(targets, parts, strict=True))))

    def read_common_facts(self) -> None:
        """Fill in the facts that the names and shapes of the first block show."""
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
            "layer_norm_eps": self.format.eps,
        }

    def read_projection(self) -> None:
        """Fill in the width and bias of the projection."""
        projection = PROJECTIONS[self.part]
        if projection + "weight" in self.tensors:
            self.projection_dim = self.shape_of(projection + "weight", 2)[0]
        self.projection_bias = projection + "bias" in self.tensors

    def shape_of(self, target: str, dims: int) -> tuple[int, ...]:
        """The shape of a parameter. Raises QLIPError if the file lacks it, or it has another number of dimensions."""
        tensor = self.tensors.get(target)
        if tensor is None:
            raise self.missing(target)
        if tensor.dim() != dims:
            key = next(taken.key for taken in self.taken if target in taken.parts)
            raise QLIPError(f"{self.source.name}: tensor {key!r} has {tensor.dim()} dimensions, expected {dims}")
        return tuple(tensor.shape)

    def missing(self, target: str) -> QLIPError:
        """The error for a parameter that the source lacks, by the source's name for it."""
        used = {taken.rule for taken in self.taken}
        rules = [entry for entry in self.entries if isinstance(entry, Rule)]
        names = (
            self.prefix + fill(rule.source, found)
            for rule in sorted(rules, key=lambda rule: rule not in used)  # first the names that other layers go by
            for pattern in rule.targets
            if (found := match(pattern, target)) is not None
        )
        return QLIPError(
            f"{self.source.name}: not a whole {self.kind}: it holds no {next(names, target)!r}; fetch the file again"
        )


def as_parameters(file: str, key: str, tensor: Tensor, rule: Rule) -> list[Tensor]:
    """Apply a rule: float32 tensors in a QLIP's orientation. Raises QLIPError for an impossible shape or type."""

    def wrong(expected: str) -> QLIPError:
        return QLIPError(f"{file}: tensor {key!r} has shape {tuple(tensor.shape)}, expected {expected}")

    if not tensor.is_floating_point():
        raise QLIPError(f"{file}: tensor {key!r} is {tensor.dtype}, not floating point; save it dequantised")
    tensor = tensor.float()
    match rule.how:
        case "split":
            count = len(rule.targets)
            if not tensor.dim() or tensor.shape[0] % count or not tensor.numel():
                raise wrong(f"{count} equal parts")
            return list(tensor.chunk(count))
        case "transposed":
            if tensor.dim() != 2:
                raise wrong("a matrix")
            return [tensor.t()]
        case "flattened":
            return [tensor.flatten()]
        case "positions":
            if tensor.dim() < 2:
                raise wrong("a vector per position")
            return [tensor.flatten(0, -2)]  # (1, positions, D) -> (positions, D)
        case "patches":
            if tensor.dim() != 4 or tensor.shape[2] != tensor.shape[3]:
                raise wrong("(width, channels, patch, patch)")
    return [tensor]


def match(pattern: str, key: str) -> re.Match[str] | None:
    """Match the whole key against a pattern; the groups fill the same placeholders elsewhere."""
    return _compiled(pattern).fullmatch(key)


def fill(pattern: str, found: re.Match[str]) -> str:
    """A pattern with a match's placeholders filled in."""
    for name, value in found.groupdict().items():
        pattern = pattern.replace("{" + name + "}", value)
    return pattern


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for placeholder, group in _PLACEHOLDERS.items():
        expression = expression.replace(re.escape(placeholder), group)
    return re.compile(expression)
