"""Finding towers in weights files, and accounting for every key."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.convert.facts import read_facts
from qlip.modeling.convert.layouts import (
    EVA,
    LAYOUTS,
    SHARED,
    TEMPERATURE,
    Drop,
    Part,
    Rule,
    eva_entries,
    fill,
    match,
)
from qlip.modeling.convert.reading import Source
from qlip.modeling.convert.report import Row
from qlip.modeling.convert.tower import NAMES, Taken, Tower

_POST_NORM_WIDTH = 1792  # EVA-02-CLIP-E normalises behind attention and MLP, under the same names


def take(source: Source, part: Part, quick_gelu: bool | None, approximate: bool) -> Tower:
    """Find a tower in a file.

    Args:
        source: what was read.
        part: which tower.
        quick_gelu: of towers whose file cannot say; None decides by the layout.
        approximate: drop what has no place in a QLIP though the tower computes something else without it.

    Raises:
        QLIPError: no known layout, a key with no place, or a tensor of an impossible shape.
    """
    tower = _recognise(source, part)
    _sort_keys(tower, approximate)
    read_facts(tower, quick_gelu)
    if part == "vision" and not tower.layout.own and tower.facts["hidden_size"] == _POST_NORM_WIDTH:
        raise QLIPError(
            f"{source.name}: blocks that normalise behind attention and MLP (EVA-02-CLIP-E's) have no place in a QLIP;"
            " take a B or L tower"
        )
    return tower


def leftovers(source: Source, towers: Sequence[Tower], approximate: bool) -> list[Row]:
    """Rows for the keys of a file that no tower took or dropped, but for the temperature's.

    Raises:
        QLIPError: a key that no layout knows.
    """
    rows = [Row("dropped", source.name, (key,), (), reason) for key, reason in source.others.items()]
    accounted = {key for tower in towers for row in tower.rows for key in row.source_keys}
    accounted |= {taken.key for tower in towers for taken in tower.taken}
    asked = {tower.part for tower in towers}
    unknown = []
    for key in source.tensors:
        if key in accounted or key in TEMPERATURE:
            continue
        reason = next((drop.reason for drop in SHARED if match(drop.source, key)), None)
        reason = reason or next((f"the {NAMES[p]} was not asked for" for p in _belongs(source, key) - asked), None)
        if reason is None:
            unknown.append(key)
            reason = "not known to the layout"
        rows.append(Row("dropped", source.name, (key,), (), reason))
    if unknown and not approximate:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        kinds = " and ".join(dict.fromkeys(tower.kind for tower in towers))
        raise QLIPError(
            f"{source.name}: {unknown[0]!r}{more} is not a name of {kinds}, and what it does would be lost;"
            " --approximate drops it"
        )
    return rows


def _belongs(source: Source, key: str) -> set[Part]:
    """The parts that a key may be of."""
    starts: tuple[tuple[str, Part], ...] = (("visual.", "vision"), ("text.", "text"))
    parts: set[Part] = {part for start, part in starts if key.startswith(start)}
    for layout in LAYOUTS:
        prefix = layout.prefix_in(source.tensors)
        if prefix is not None and key.startswith(prefix):
            parts |= {layout.part for entry in layout.entries if match(entry.source, key[len(prefix) :])}
    return parts


def _recognise(source: Source, part: Part) -> Tower:
    keys = source.tensors
    own = source.config is not None
    for layout in LAYOUTS:
        if layout.part == part and layout.own == own and (prefix := layout.prefix_in(keys)) is not None:
            if layout is EVA:
                kind, entries = _eva_variant(keys, prefix)
                return Tower(part, source, layout, prefix, kind, entries)
            return Tower(part, source, layout, prefix, layout.name, layout.entries)
    if not keys:
        raise QLIPError(f"{source.name}: holds no tensors")
    if any(layout.own and layout.prefix_in(keys) is not None for layout in LAYOUTS):
        raise QLIPError(
            f"{source.name}: a QLIP's (or Hugging Face CLIP's) names; name a QLIP checkpoint's folder instead"
        )
    block = "transformer.resblocks.0.attn.in_proj_weight"
    expected = {
        "vision": "EVA's names (cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight) or OpenCLIP's"
        f" (conv1.weight, {block}), bare or behind 'visual.'",
        "text": f"CLIP's names (token_embedding.weight, {block}), bare or behind 'text.'",
    }[part]
    begins = ", ".join(repr(key) for key in list(keys)[:2])
    raise QLIPError(f"{source.name}: no {NAMES[part]} that is known here; expected {expected}; it holds {begins}, ...")


def _eva_variant(tensors: dict[str, Tensor], prefix: str) -> tuple[str, Sequence[Rule | Drop]]:
    """An EVA tower in words, and its rules."""

    def has(*names: str) -> bool:
        return any(prefix + name in tensors for name in names)

    def rows(name: str) -> int:
        tensor = tensors.get(prefix + name)
        return tensor.shape[0] if tensor is not None and tensor.dim() == 2 else 0

    def columns(name: str) -> int:
        tensor = tensors.get(prefix + name)
        return tensor.shape[1] if tensor is not None and tensor.dim() == 2 else 0

    mlp = "blocks.0.mlp."
    packed = 0 < rows(mlp + "fc1.weight") == 2 * columns(mlp + "fc2.weight")  # gate and value in one matrix
    gated = has(mlp + "w1.weight", mlp + "w12.weight", mlp + "fc1_g.weight") or packed
    classifier = has("fc_norm.weight")
    if has("mask_token", "lm_head.weight"):
        kind = "masked image modelling"
    elif classifier:
        kind = "fine-tuned classifier"
    else:
        kind = "EVA-CLIP" if has("head.weight") else "without head"
    timm = ", timm's names" if has(mlp + "norm.weight", mlp + "fc1_g.weight", "blocks.0.attn.norm.weight") else ""
    return f"EVA image tower ({kind}{timm})", eva_entries(gated=gated, classifier=classifier)


def _refuse_unless(approximate: bool, source: Source, why: str) -> None:
    if not approximate:
        raise QLIPError(f"{source.name}: {why}; --approximate goes on without, and the tower computes something else")


def _sort_keys(tower: Tower, approximate: bool) -> None:
    """Every key behind the tower's prefix: taken, or dropped with its reason."""
    source, seen = tower.source, dict[str, str]()
    for key, tensor in source.tensors.items():
        name = key.removeprefix(tower.prefix)
        if not key.startswith(tower.prefix):
            continue
        found = ((entry, matched) for entry in tower.entries if (matched := match(entry.source, name)) is not None)
        entry, matched = next(found, (None, None))
        if isinstance(entry, Drop):
            if entry.changes:
                _refuse_unless(approximate, source, f"{key!r}: {entry.reason}")
            tower.rows.append(Row("dropped", source.name, (key,), (), entry.reason))
        elif entry is not None and matched is not None:
            targets = [fill(target, matched) for target in entry.targets]
            for target in targets:
                if target in seen:
                    raise QLIPError(f"{source.name}: {seen[target]!r} and {key!r} are the same thing; leave one out")
                seen[target] = key
            tower.taken.append(Taken(key, entry, dict(zip(targets, _split(source, key, tensor, entry), strict=True))))


def _split(source: Source, key: str, tensor: Tensor, rule: Rule) -> list[Tensor]:
    """A tensor's parts in float32, as a QLIP holds them."""

    def wrong(expected: str) -> QLIPError:
        return QLIPError(f"{source.name}: tensor {key!r} has shape {tuple(tensor.shape)}, expected {expected}")

    if not tensor.is_floating_point():
        raise QLIPError(f"{source.name}: tensor {key!r} is {tensor.dtype}, not floating point; save it dequantised")
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
                raise wrong("a vector a position")
            return [tensor.flatten(0, -2)]
        case "patches":
            if tensor.dim() != 4 or tensor.shape[2] != tensor.shape[3]:
                raise wrong("(width, channels, patch, patch)")
    return [tensor]
