"""Find the towers in a weights file, and account for every key of it."""

from __future__ import annotations

from collections.abc import Sequence

from qlip.errors import QLIPError
from qlip.modeling.convert import open_clip, qlip
from qlip.modeling.convert.eva import EVA
from qlip.modeling.convert.open_clip import CLIP_TEXT, TEMPERATURE
from qlip.modeling.convert.qlip import OWN_TEXT, OWN_VISION
from qlip.modeling.convert.report import Row
from qlip.modeling.convert.rules import NAMES, Format, Part, Tower, match
from qlip.modeling.convert.weights_file import Source

FORMATS: tuple[Format, ...] = (EVA, CLIP_TEXT, OWN_VISION, OWN_TEXT)
_BESIDE = {**open_clip.BESIDE, **qlip.BESIDE}

_EXPECTED: dict[Part, str] = {
    "vision": "EVA's names (cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight), bare or under"
    " 'visual.'",
    "text": "CLIP's names (token_embedding.weight, transformer.resblocks.0.attn.in_proj_weight), bare or under 'text.'",
}


def take(source: Source, part: Part) -> Tower:
    """Find a tower in a file and read its tensors and facts.

    Raises:
        QLIPError: no known format, a key that must not be dropped, or a tensor of an impossible shape.
    """
    tower = _recognise(source, part)
    tower.sort_keys()
    tower.format.read_facts(tower)
    tower.read_projection()
    return tower


def leftovers(source: Source, towers: Sequence[Tower]) -> list[Row]:
    """Rows for the keys of a file that no tower took or dropped, except the temperature's.

    Raises:
        QLIPError: a key that no format knows.
    """
    rows = [Row("dropped", source.name, (key,), (), reason) for key, reason in source.others.items()]
    accounted = {key for tower in towers for row in tower.rows for key in row.source_keys}
    asked = {tower.part for tower in towers}
    unknown = []
    for key in source.tensors:
        if key in accounted or key in TEMPERATURE:
            continue
        reasons = [drop.reason for pattern, drop in _BESIDE.items() if match(pattern, key)]
        reasons += [f"the {NAMES[part]} was not asked for" for part in _parts_of(source, key) - asked]
        if reasons:
            rows.append(Row("dropped", source.name, (key,), (), reasons[0]))
        else:
            unknown.append(key)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        kinds = " and ".join(dict.fromkeys(tower.kind for tower in towers))
        raise QLIPError(
            f"{source.name}: {unknown[0]!r}{more} is not a name of {kinds}, and its effect would be lost; remove the"
            " tensor from the file if the tower works without it"
        )
    return rows


def _parts_of(source: Source, key: str) -> set[Part]:
    """The parts that a key may belong to."""
    starts: tuple[tuple[str, Part], ...] = (("visual.", "vision"), ("text.", "text"))
    parts: set[Part] = {part for start, part in starts if key.startswith(start)}
    for format in FORMATS:
        prefix = format.prefix_in(source.tensors)
        if prefix is not None and key.startswith(prefix):
            parts |= {format.part for pattern in format.rules if match(pattern, key[len(prefix) :])}
    return parts


def _recognise(source: Source, part: Part) -> Tower:
    keys = source.tensors
    for format in FORMATS:
        if (format.part, format.own) != (part, source.config is not None):
            continue
        if (prefix := format.prefix_in(keys)) is not None:
            kind, further = format.variant(keys, prefix)
            return Tower(source, format, prefix, format.name + kind, {**format.rules, **further})
    if not keys:
        raise QLIPError(f"{source.name}: holds no tensors")
    if any(format.own and format.prefix_in(keys) is not None for format in FORMATS):
        raise QLIPError(
            f"{source.name}: has the names of a QLIP or of Hugging Face's CLIP; give a QLIP checkpoint's folder instead"
        )
    if part == "vision" and open_clip.is_image_tower(keys):
        raise QLIPError(
            f"{source.name}: OpenCLIP's image tower has a norm before the blocks (ln_pre), a QLIP has none; take an EVA"
            " image tower"
        )
    begins = ", ".join(repr(key) for key in list(keys)[:2])
    raise QLIPError(f"{source.name}: holds no known {NAMES[part]}; expected {_EXPECTED[part]}; found {begins}, ...")
