"""The towers of another QLIP checkpoint, whose config holds all facts."""

from __future__ import annotations

from qlip.modeling.convert.rules import CLASS_TOKEN, PATCHES, POSITIONS, Drop, Format, Rules, Tower

_EMBEDDINGS = "vision_model.embeddings."
_ROPE, _RECOMPUTED = Drop("rotary table, recomputed"), Drop("recomputed")
_BOTTLENECK = Drop("the bottleneck starts from random weights")

_VISION_RULES: Rules = {
    "vision_model.encoder.layers.{n}.self_attn.rope.{rest}": _ROPE,
    "vision_model.rope.{rest}": _ROPE,
    POSITIONS: POSITIONS,
    PATCHES: PATCHES,
    _EMBEDDINGS + "{rest}": _EMBEDDINGS + "{rest}",
    "vision_model.encoder.{rest}": "vision_model.encoder.{rest}",
    "vision_model.post_layernorm.{p}": "vision_model.post_layernorm.{p}",
    "visual_projection.{p}": "visual_projection.{p}",
}
_TEXT_RULES: Rules = {
    "text_model.{rest}": "text_model.{rest}",
    "text_projection.{p}": "text_projection.{p}",
}
BESIDE: dict[str, Drop] = {
    "text_model.embeddings.position_ids": _RECOMPUTED,
    _EMBEDDINGS + "position_ids": _RECOMPUTED,
    "vision_model.quant_embed.{rest}": _BOTTLENECK,
    "vision_model.quant_embed_post.{rest}": _BOTTLENECK,
    "vision_model.quantizer.{rest}": _RECOMPUTED,
    "vision_decoder.{rest}": Drop("the decoder starts from random weights"),
}
"""Names of a QLIP checkpoint that belong to no tower."""


def _read_vision_facts(tower: Tower) -> None:
    """Copy the facts from the checkpoint's config."""
    assert tower.source.config is not None
    config = tower.source.config.vision_config
    tower.facts, tower.patch_size, tower.grid = config.to_dict(), config.patch_size, config.grid_size


def _read_text_facts(tower: Tower) -> None:
    """Copy the facts from the checkpoint's config."""
    assert tower.source.config is not None
    tower.facts = tower.source.config.text_config.to_dict()


OWN_VISION = Format(
    part="vision",
    name="QLIP checkpoint",
    prefixes=("",),
    anchors=(CLASS_TOKEN, PATCHES),
    rules=_VISION_RULES,
    read_facts=_read_vision_facts,
    own=True,
)
OWN_TEXT = Format(
    part="text",
    name="QLIP checkpoint",
    prefixes=("",),
    anchors=("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    rules=_TEXT_RULES,
    read_facts=_read_text_facts,
    own=True,
)
