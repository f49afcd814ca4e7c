"""The towers of another QLIP checkpoint, whose config holds all facts."""

from __future__ import annotations

from qlip.modeling.convert.rules import Drop, Entries, Format, Rule, Tower

_EMBEDDINGS = "vision_model.embeddings."
_ROPE = "rotary table, recomputed"
_FACTS = (
    "hidden_size num_hidden_layers intermediate_size num_attention_heads swiglu subln q_bias k_bias v_bias"
    " layer_norm_eps hidden_act"
).split()

VISION_ENTRIES: Entries = (
    Drop("vision_model.encoder.layers.{n}.self_attn.rope.{rest}", _ROPE),
    Drop("vision_model.rope.{rest}", _ROPE),
    Rule(_EMBEDDINGS + "position_embedding.weight", (_EMBEDDINGS + "position_embedding.weight",), "positions"),
    Rule(_EMBEDDINGS + "patch_embedding.weight", (_EMBEDDINGS + "patch_embedding.weight",), "patches"),
    *(
        Rule(name, (name,))
        for name in (
            _EMBEDDINGS + "{rest}",
            "vision_model.encoder.{rest}",
            "vision_model.post_layernorm.{p}",
            "visual_projection.{p}",
        )
    ),
)
TEXT_ENTRIES: Entries = tuple(Rule(name, (name,)) for name in ("text_model.{rest}", "text_projection.{p}"))

BESIDE: tuple[Drop, ...] = (
    Drop("text_model.embeddings.position_ids", "recomputed"),
    Drop("vision_model.embeddings.position_ids", "recomputed"),
    Drop("vision_model.quant_embed.{rest}", "the bottleneck starts from random weights"),
    Drop("vision_model.quant_embed_post.{rest}", "the bottleneck starts from random weights"),
    Drop("vision_model.quantizer.{rest}", "recomputed"),
    Drop("vision_decoder.{rest}", "the decoder starts from random weights"),
)
"""Names of a QLIP checkpoint that belong to no tower."""


class OwnVision(Format):
    """The image tower of a QLIP checkpoint."""

    part = "vision"
    name = "QLIP checkpoint"
    prefixes = ("",)
    anchors = (_EMBEDDINGS + "class_embedding", _EMBEDDINGS + "patch_embedding.weight")
    entries = VISION_ENTRIES
    own = True

    def read_facts(self, tower: Tower) -> None:
        """Copy the facts from the checkpoint's config."""
        assert tower.source.config is not None
        config = tower.source.config.vision_config
        tower.facts = {name: getattr(config, name) for name in (*_FACTS, "num_channels", "rope")}
        tower.patch_size, tower.grid = config.patch_size, config.grid_size


class OwnText(Format):
    """The text tower of a QLIP checkpoint."""

    part = "text"
    name = "QLIP checkpoint"
    prefixes = ("",)
    anchors = ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight")
    entries = TEXT_ENTRIES
    own = True

    def read_facts(self, tower: Tower) -> None:
        """Copy the facts from the checkpoint's config."""
        assert tower.source.config is not None
        own = ("vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id")
        config = tower.source.config.text_config
        tower.facts = {name: getattr(config, name) for name in (*_FACTS, *own)}


OWN_VISION, OWN_TEXT = OwnVision(), OwnText()
