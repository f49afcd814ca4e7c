"""The configuration of the result: named, or built from the towers, and checked against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.errors import QLIPError
from qlip.modeling.config import QLIPConfig, QLIPTextConfig
from qlip.modeling.convert.rules import HEAD_WIDTH, NAMES, Tower

AUTO = "auto"
ABSENT_VISION = "QLIP-B-16-256"
"""The configuration whose image tower and decoder a text tower alone is given."""

_COMPARED = {
    "vision": (
        "hidden_size num_hidden_layers num_attention_heads swiglu intermediate_size subln rope q_bias k_bias v_bias"
        " num_channels"
    ).split(),
    "text": (
        "hidden_size num_hidden_layers num_attention_heads swiglu intermediate_size subln q_bias k_bias v_bias"
        " vocab_size max_position_embeddings eos_token_id"
    ).split(),
}
_ADOPTED = ("hidden_act", "layer_norm_eps")
"""Settings without a shape: the source's replace the config's, since its weights were trained with them."""

FIRST_RELEASE_EOS = 2
"""The wrong end token in CLIP's first configs: it stands for the largest id of the text."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a config that is built from towers; None for the default.

    Attributes:
        image_size: pixels per side; by default the source's grid times the patch size.
        patch_size: pixels per patch side; by default the source's.
        bits: bits per token; 28 by default.
        group_size: bits per group; 7 by default.
    """

    image_size: int | None = None
    patch_size: int | None = None
    bits: int | None = None
    group_size: int | None = None


def resolve(config: QLIPConfig | str | Path, sizes: Sizes) -> QLIPConfig | None:
    """A configuration by its name or file; None for ``"auto"``.

    Raises:
        QLIPError: no such configuration, or sizes given beside one.
    """
    if config == AUTO:
        return None
    given = [name for name in ("image_size", "patch_size", "bits", "group_size") if getattr(sizes, name) is not None]
    if given:
        raise QLIPError(f'{given[0]} applies to config "auto" only; this config holds it already')
    if isinstance(config, QLIPConfig):
        return config
    path = Path(config).expanduser()
    if path.is_dir():
        return QLIPConfig.from_file(path / "config.json")
    if path.suffix == ".json" or path.exists():
        return QLIPConfig.from_file(path)
    return QLIPConfig.named(str(config))


def check(tower: Tower, config: QLIPConfig, where: str) -> None:
    """Refuse a tower that a configuration does not describe.

    Args:
        tower: a tower with its facts.
        config: the result's.
        where: name of the configuration in the error.

    Raises:
        QLIPError: naming the first difference.
    """
    section = config.vision_config if tower.part == "vision" else config.text_config
    differences = (
        (name, tower.facts[name], getattr(section, name))
        for name in _COMPARED[tower.part]
        if tower.facts.get(name) is not None and tower.facts[name] != getattr(section, name)
    )
    for name, theirs, ours in differences:
        if name == "eos_token_id" and ours == FIRST_RELEASE_EOS:
            continue
        _refuse(tower, f"{tower.part}_config.{name}", theirs, ours, where)
    if tower.projection_dim not in (None, config.projection_dim):
        _refuse(tower, "projection_dim", tower.projection_dim, config.projection_dim, where)
    biased = config.vision_projection_bias if tower.part == "vision" else config.text_projection_bias
    if tower.projection_bias and not biased:
        _refuse(tower, f"{tower.part}_projection_bias", True, False, where)
    if tower.facts.get("num_attention_heads") is None:
        assumed, usual = section.num_attention_heads, tower.conventional_heads
        odd = f", though towers of its width have {usual}" if usual not in (None, assumed) else ""
        tower.notes.append(
            f"{NAMES[tower.part]}: the file does not say the number of heads; {assumed} taken from {where}{odd}"
        )


def _refuse(tower: Tower, name: str, theirs: Any, ours: Any, where: str) -> None:
    raise QLIPError(
        f"{tower.source.name}: {name} is {theirs} in this {tower.kind}, {ours} in {where}; choose a config that fits,"
        f' or "{AUTO}", which builds one from the source'
    )


def adopt(config: QLIPConfig, towers: list[Tower], where: str) -> tuple[QLIPConfig, list[str]]:
    """Put the settings that the sources' weights were trained with into the configuration.

    Returns:
        The configuration, and a note per change.
    """
    values, notes = config.to_dict(), []
    for tower in towers:
        section = values[f"{tower.part}_config"]
        for name in _ADOPTED:
            theirs = tower.facts.get(name)
            if theirs is not None and theirs != section[name]:
                notes.append(f"{tower.part}_config.{name}: {theirs}, the source's, instead of {section[name]}")
                section[name] = theirs
    return (QLIPConfig.from_dict(values, where) if notes else config), notes


def build(vision: Tower | None, text: Tower | None, sizes: Sizes) -> QLIPConfig:
    """Build a configuration that fits the towers.

    The decoder has the encoder's sizes. What a tower is absent for has the published B model's sizes.

    Args:
        vision: the image tower, if any.
        text: the text tower, if any; at least one of both is needed.
        sizes: sizes that the towers leave open.

    Raises:
        QLIPError: sizes that do not fit, or towers that project to different widths.
    """
    widths = {tower.projection_dim for tower in (vision, text) if tower is not None} - {None}
    if len(widths) > 1 and text is not None and vision is not None:
        raise QLIPError(
            f"{text.source.name}: projects to {text.projection_dim}, {vision.source.name} to {vision.projection_dim};"
            " a QLIP's towers share one space: take both from one model, or leave one out"
        )
    own = QLIPConfig.named(ABSENT_VISION) if vision is None else vision.source.config
    quantizer = {"embed_dim": 28, "group_size": 7, "input_format": "blc", "l2_norm": True}
    if own is not None:
        encoder, decoder = own.to_dict()["vision_config"], own.to_dict()["decoder_config"]
        quantizer, grid, old = encoder["quantizer_cfg"], own.vision_config.grid_size, own.vision_config.patch_size
    else:
        assert vision is not None
        grid, old = vision.grid, vision.patch_size
        decoder = _with_heads(vision)
        encoder = decoder | {"quantizer": "bsq", "quantizer_l2_norm": True, "quantizer_embed_type": "mlp"}
        decoder = {name: value for name, value in decoder.items() if name != "num_channels"}
    patch = sizes.patch_size or old
    image = {"image_size": sizes.image_size or grid * patch, "patch_size": patch}
    asked = {"embed_dim": sizes.bits, "group_size": sizes.group_size}
    quantizer = quantizer | {name: value for name, value in asked.items() if value is not None}
    values = {
        "projection_dim": next(iter(widths), 512),
        "vision_projection_bias": vision is None or vision.projection_bias or vision.projection_dim is None,
        "text_projection_bias": text is not None and text.projection_bias,
        "vision_config": encoder | image | {"quantizer_cfg": quantizer},
        "decoder_config": decoder | image,
        "text_config": _text_section(text),
    }
    return QLIPConfig.from_dict(values, f'config "{AUTO}"')


def _text_section(text: Tower | None) -> dict[str, Any]:
    if text is None:
        return QLIPTextConfig().to_dict()
    if text.source.config is not None:
        return text.source.config.text_config.to_dict()
    return _with_heads(text)


def _with_heads(tower: Tower) -> dict[str, Any]:
    """A tower's facts as a section of a config, with the usual number of heads if the file does not show it."""
    heads = tower.facts["num_attention_heads"]
    if heads is None:
        heads = tower.conventional_heads
        if heads is None:
            raise QLIPError(
                f"{tower.source.name}: the file does not say the number of heads, and the width"
                f" {tower.facts['hidden_size']} is not a multiple of {HEAD_WIDTH}; name a config that holds it"
            )
        tower.notes.append(
            f"{NAMES[tower.part]}: the file does not say the number of heads; {heads} is usual for its width"
        )
        tower.facts["num_attention_heads"] = heads
    return tower.facts | {"num_attention_heads": heads}
