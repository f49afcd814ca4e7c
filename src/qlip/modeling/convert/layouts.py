"""The names under which pretrained towers are published, and where each has its place in a QLIP.

Facts of the public sources: EVA-02 and EVA-CLIP (baaivision/EVA), the same towers under timm's names (as OpenCLIP
publishes them), OpenCLIP (mlfoundations/open_clip), and a QLIP's own. A pattern's ``{n}`` is a layer's number, ``{p}``
weight or bias, ``{rest}`` anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Part = Literal["vision", "text"]
How = Literal["", "split", "transposed", "flattened", "positions", "patches"]

_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Rule:
    """A source's tensor and the parameters it becomes.

    Attributes:
        source: pattern of the key, behind the layout's prefix.
        targets: the QLIP's names; several where the tensor is split evenly along its first dimension.
        how: what is done to the tensor.
    """

    source: str
    targets: tuple[str, ...]
    how: How = ""


@dataclass(frozen=True)
class Drop:
    """A source's tensor that a QLIP does not take.

    Attributes:
        source: pattern of the key, behind the layout's prefix.
        reason: in words.
        changes: the tower computes something else without it, so it takes ``approximate``.
    """

    source: str
    reason: str
    changes: bool = False


@dataclass(frozen=True)
class Layout:
    """One way to name a tower.

    Attributes:
        part: of the QLIP.
        name: in words.
        prefixes: before every name of the tower, the longest first.
        anchors: names that show the layout, without prefix.
        entries: rules and drops; the first that matches counts.
        eps: of the norms, which no file holds.
        own: a QLIP checkpoint, whose config says everything.
    """

    part: Part
    name: str
    prefixes: tuple[str, ...]
    anchors: tuple[str, ...]
    entries: tuple[Rule | Drop, ...]
    eps: float = 1e-5
    own: bool = False

    def prefix_in(self, keys: Collection[str]) -> str | None:
        """The prefix with which this layout is in a file, or None where it is not."""
        found = (prefix for prefix in self.prefixes if all(prefix + anchor in keys for anchor in self.anchors))
        return next(found, None)


def match(pattern: str, key: str) -> re.Match[str] | None:
    """The whole key against a pattern; its groups fill the same placeholders elsewhere."""
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


_VISION = "vision_model."
_EMBEDDINGS = "vision_model.embeddings."
_LAYER = "encoder.layers.{n}."
_QKV = ("q_proj", "k_proj", "v_proj")


def _qkv(tower: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{tower}{_LAYER}self_attn.{name}.{leaf}" for name in _QKV)


def _blocks(source: str, tower: str, names: dict[str, str]) -> Iterable[Rule]:
    """Rules of one block, by the names inside it."""
    return (Rule(source + theirs, (tower + _LAYER + ours,)) for theirs, ours in names.items())


_ROPE = "rotary table, computed anew"
_LAYER_SCALE = "a scale behind each layer has no place in a QLIP"
_RELATIVE = "a relative position bias has no place in a QLIP"

EVA = Layout(
    "vision",
    "EVA",
    ("visual.trunk.", "visual.", ""),
    ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"),
    (
        Rule("cls_token", (_EMBEDDINGS + "class_embedding",), "flattened"),
        Rule("pos_embed", (_EMBEDDINGS + "position_embedding.weight",), "positions"),
        Rule("patch_embed.proj.weight", (_EMBEDDINGS + "patch_embedding.weight",), "patches"),
        Rule("patch_embed.proj.bias", (_EMBEDDINGS + "patch_embedding.bias",)),
        Rule("blocks.{n}.attn.qkv.weight", _qkv(_VISION, "weight"), "split"),
        *_blocks(
            "blocks.{n}.",
            _VISION,
            {
                "norm1.{p}": "layer_norm1.{p}",
                "norm2.{p}": "layer_norm2.{p}",
                "attn.q_proj.{p}": "self_attn.q_proj.{p}",
                "attn.k_proj.{p}": "self_attn.k_proj.{p}",
                "attn.v_proj.{p}": "self_attn.v_proj.{p}",
                "attn.q_bias": "self_attn.q_proj.bias",
                "attn.v_bias": "self_attn.v_proj.bias",
                "attn.inner_attn_ln.{p}": "self_attn.inner_attn_ln.{p}",
                "attn.norm.{p}": "self_attn.inner_attn_ln.{p}",  # timm's name
                "attn.proj.{p}": "self_attn.out_proj.{p}",
                "mlp.w1.{p}": "mlp.w1.{p}",
                "mlp.w2.{p}": "mlp.w2.{p}",
                "mlp.w3.{p}": "mlp.w3.{p}",
                "mlp.ffn_ln.{p}": "mlp.ffn_ln.{p}",
                "mlp.norm.{p}": "mlp.ffn_ln.{p}",  # timm's name
            },
        ),
        Rule("norm.{p}", (_VISION + "post_layernorm.{p}",)),
        Rule("head.{p}", ("visual_projection.{p}",)),
        Drop("mask_token", "stands for hidden patches in masked image modelling only"),
        Drop("lm_head.{p}", "predicts features of hidden patches in masked image modelling only"),
        Drop("rope.{rest}", _ROPE),
        Drop("blocks.{n}.attn.rope.{rest}", _ROPE),
        Drop("blocks.{n}.gamma_1", _LAYER_SCALE, changes=True),
        Drop("blocks.{n}.gamma_2", _LAYER_SCALE, changes=True),
        Drop("rel_pos_bias.{rest}", _RELATIVE, changes=True),
        Drop("blocks.{n}.attn.relative_position_{rest}", _RELATIVE, changes=True),
        Drop("blocks.{n}.attn.rel_pos_bias.{rest}", _RELATIVE, changes=True),
    ),
    eps=1e-6,
)

# What a block's MLP is called depends on what it is, not only on the key; see `eva_entries`.
_GELU = tuple(
    _blocks("blocks.{n}.", _VISION, {"mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}"}),
)
_GATED = (
    Rule("blocks.{n}.mlp.w12.{p}", tuple(f"{_VISION}{_LAYER}mlp.{w}.{{p}}" for w in ("w1", "w2")), "split"),
    Rule("blocks.{n}.mlp.fc1.{p}", tuple(f"{_VISION}{_LAYER}mlp.{w}.{{p}}" for w in ("w1", "w2")), "split"),
    *_blocks(
        "blocks.{n}.",
        _VISION,
        {"mlp.fc1_g.{p}": "mlp.w1.{p}", "mlp.fc1_x.{p}": "mlp.w2.{p}", "mlp.fc2.{p}": "mlp.w3.{p}"},
    ),
)
_CLASSIFIER = (
    Drop("fc_norm.{p}", "norm of a classifier's averaged patches"),
    Drop("head.{p}", "a classifier over averaged patches, no projection of [CLS]"),
)


def eva_entries(*, gated: bool, classifier: bool) -> tuple[Rule | Drop, ...]:
    """EVA's rules for a SwiGLU MLP (packed matrices and timm's names too) or a GELU one, and for a classifier."""
    return (_CLASSIFIER if classifier else ()) + (_GATED if gated else _GELU) + EVA.entries


_OPEN_CLIP_BLOCK = {
    "ln_1.{p}": "layer_norm1.{p}",
    "ln_2.{p}": "layer_norm2.{p}",
    "attn.out_proj.{p}": "self_attn.out_proj.{p}",
    "mlp.c_fc.{p}": "mlp.fc1.{p}",
    "mlp.c_proj.{p}": "mlp.fc2.{p}",
}


def _open_clip_blocks(tower: str) -> tuple[Rule | Drop, ...]:
    block = "transformer.resblocks.{n}."
    return (
        Rule(block + "attn.in_proj_weight", _qkv(tower, "weight"), "split"),
        Rule(block + "attn.in_proj_bias", _qkv(tower, "bias"), "split"),
        *_blocks(block, tower, _OPEN_CLIP_BLOCK),
        Drop(block + "ls_1.gamma", _LAYER_SCALE, changes=True),
        Drop(block + "ls_2.gamma", _LAYER_SCALE, changes=True),
    )


OPEN_CLIP_VISION = Layout(
    "vision",
    "OpenCLIP image tower",
    ("visual.", ""),
    ("conv1.weight", "class_embedding", "positional_embedding", "transformer.resblocks.0.attn.in_proj_weight"),
    (
        Rule("class_embedding", (_EMBEDDINGS + "class_embedding",)),
        Rule("positional_embedding", (_EMBEDDINGS + "position_embedding.weight",), "positions"),
        Rule("conv1.weight", (_EMBEDDINGS + "patch_embedding.weight",), "patches"),
        Rule("conv1.bias", (_EMBEDDINGS + "patch_embedding.bias",)),
        *_open_clip_blocks(_VISION),
        Rule("ln_post.{p}", (_VISION + "post_layernorm.{p}",)),
        Rule("proj", ("visual_projection.weight",), "transposed"),
        Drop("ln_pre.{p}", "a norm before the blocks has no place in a QLIP", changes=True),
    ),
)

CLIP_TEXT = Layout(
    "text",
    "EVA-CLIP or OpenCLIP text tower",
    ("text.", ""),
    (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight",
    ),
    (
        Rule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_open_clip_blocks("text_model."),
        Rule("ln_final.{p}", ("text_model.final_layer_norm.{p}",)),
        Rule("text_projection", ("text_projection.weight",), "transposed"),
        Rule("text_projection.{p}", ("text_projection.{p}",)),
        Drop("attn_mask", "causal mask, computed anew"),
    ),
)

_OWN_VISION_RULES = ("vision_model.embeddings.{rest}", "vision_model.encoder.{rest}", "vision_model.post_layernorm.{p}")
OWN_VISION = Layout(
    "vision",
    "QLIP checkpoint",
    ("",),
    (_EMBEDDINGS + "class_embedding", _EMBEDDINGS + "patch_embedding.weight"),
    (
        Drop("vision_model.encoder.layers.{n}.self_attn.rope.{rest}", _ROPE),
        Drop("vision_model.rope.{rest}", _ROPE),
        Rule(_EMBEDDINGS + "position_embedding.weight", (_EMBEDDINGS + "position_embedding.weight",), "positions"),
        Rule(_EMBEDDINGS + "patch_embedding.weight", (_EMBEDDINGS + "patch_embedding.weight",), "patches"),
        *(Rule(name, (name,)) for name in (*_OWN_VISION_RULES, "visual_projection.{p}")),
    ),
    own=True,
)
OWN_TEXT = Layout(
    "text",
    "QLIP checkpoint",
    ("",),
    ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    tuple(Rule(name, (name,)) for name in ("text_model.{rest}", "text_projection.{p}")),
    own=True,
)

LAYOUTS = (EVA, OPEN_CLIP_VISION, CLIP_TEXT, OWN_VISION, OWN_TEXT)

# names of a whole file that belong to no tower
SHARED = (
    Drop("logit_bias", "a QLIP's logits have no bias"),
    Drop("attn_mask", "causal mask, computed anew"),
    Drop("position_ids", "counted anew"),
    Drop("text.transformer.embeddings.position_ids", "counted anew"),
    Drop("text_model.embeddings.position_ids", "counted anew"),
    Drop("vision_model.embeddings.position_ids", "counted anew"),
    Drop("input_resolution", "a number of OpenAI's files, no weight"),
    Drop("context_length", "a number of OpenAI's files, no weight"),
    Drop("vocab_size", "a number of OpenAI's files, no weight"),
    Drop("vision_model.quant_embed.{rest}", "the bottleneck starts fresh"),
    Drop("vision_model.quant_embed_post.{rest}", "the bottleneck starts fresh"),
    Drop("vision_model.quantizer.{rest}", "computed anew"),
    Drop("vision_decoder.{rest}", "the decoder starts fresh"),
)
TEMPERATURE = ("logit_scale", "text.logit_scale")
"""Where the temperature's logarithm is; the second in EVA-CLIP's older files."""
