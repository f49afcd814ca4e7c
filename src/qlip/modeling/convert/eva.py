"""EVA's image towers: EVA-01, EVA-02 and EVA-CLIP (baaivision/EVA), and the same under timm's names.

Published in several variants: with a GELU or a gated (SwiGLU) MLP, whose two matrices may be packed in one; pre-trained
by masked image modelling, as half of a CLIP, or fine-tuned as a classifier. `EVA.variant` tells them apart by names.
timm names the final norm of a classifier ``fc_norm``, and so it does in its pre-trained towers without a head
(``*.mim_in22k``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.attention import rope_tables
from qlip.modeling.convert.resample import grid_of
from qlip.modeling.convert.rules import NAMES, Drop, Entries, Format, Rule, Tower, block_rules, qkv

_POST_NORM_WIDTH = 1792  # EVA-02-CLIP-E normalises after attention and MLP, under the same names
_ROPE_TOLERANCE = 1e-2  # tables may be stored in bfloat16

_EMBEDDINGS = "vision_model.embeddings."
_LAYER = "vision_model.encoder.layers.{n}."
_GATE_AND_VALUE = tuple(f"{_LAYER}mlp.{name}.{{p}}" for name in ("w1", "w2"))
_ROPE = "rotary table, recomputed"
_LAYER_SCALE = "a QLIP has no scale after each layer"
_RELATIVE = "a QLIP has no relative position bias"

ENTRIES: Entries = (
    Rule("cls_token", (_EMBEDDINGS + "class_embedding",), "flattened"),
    Rule("pos_embed", (_EMBEDDINGS + "position_embedding.weight",), "positions"),
    Rule("patch_embed.proj.weight", (_EMBEDDINGS + "patch_embedding.weight",), "patches"),
    Rule("patch_embed.proj.bias", (_EMBEDDINGS + "patch_embedding.bias",)),
    Rule("blocks.{n}.attn.qkv.weight", qkv(_LAYER, "weight"), "split"),
    *block_rules(
        "blocks.{n}.",
        _LAYER,
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
    Rule("norm.{p}", ("vision_model.post_layernorm.{p}",)),
    Rule("head.{p}", ("visual_projection.{p}",)),
    Drop("mask_token", "marks hidden patches in masked image modelling only"),
    Drop("lm_head.{p}", "predicts features of hidden patches in masked image modelling only"),
    Drop("rope.{rest}", _ROPE),
    Drop("blocks.{n}.attn.rope.{rest}", _ROPE),
    Drop("blocks.{n}.gamma_1", _LAYER_SCALE, refused=True),
    Drop("blocks.{n}.gamma_2", _LAYER_SCALE, refused=True),
    Drop("rel_pos_bias.{rest}", _RELATIVE, refused=True),
    Drop("blocks.{n}.attn.relative_position_{rest}", _RELATIVE, refused=True),
    Drop("blocks.{n}.attn.rel_pos_bias.{rest}", _RELATIVE, refused=True),
)
GELU: Entries = tuple(block_rules("blocks.{n}.", _LAYER, {"mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}"}))
GATED: Entries = (
    Rule("blocks.{n}.mlp.w12.{p}", _GATE_AND_VALUE, "split"),
    Rule("blocks.{n}.mlp.fc1.{p}", _GATE_AND_VALUE, "split"),
    *block_rules(
        "blocks.{n}.",
        _LAYER,
        {"mlp.fc1_g.{p}": "mlp.w1.{p}", "mlp.fc1_x.{p}": "mlp.w2.{p}", "mlp.fc2.{p}": "mlp.w3.{p}"},
    ),
)
CLASSIFIER: Entries = (
    Drop("fc_norm.{p}", "norm of a classifier's averaged patches"),
    Drop("head.{p}", "a classifier over averaged patches, not a projection of [CLS]"),
)
HEADLESS: Entries = (Rule("fc_norm.{p}", ("vision_model.post_layernorm.{p}",)),)


class Eva(Format):
    """EVA's names."""

    part = "vision"
    name = "EVA image tower"
    prefixes = ("visual.trunk.", "visual.", "")
    anchors = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    entries = ENTRIES
    eps = 1e-6

    def variant(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, Entries]:
        """Name and entries of the variant that a file holds."""

        def has(*names: str) -> bool:
            return any(prefix + name in tensors for name in names)

        def size(name: str, dim: int) -> int:
            tensor = tensors.get(prefix + name)
            return tensor.shape[dim] if tensor is not None and tensor.dim() == 2 else 0

        mlp = "blocks.0.mlp."
        packed = 0 < size(mlp + "fc1.weight", 0) == 2 * size(mlp + "fc2.weight", 1)  # gate and value in one matrix
        gated = packed or has(mlp + "w1.weight", mlp + "w12.weight", mlp + "fc1_g.weight")
        averages = has("fc_norm.weight")
        headless = averages and not has("head.weight", "norm.weight")
        classifier = averages and not headless
        if has("mask_token", "lm_head.weight") or headless:
            kind = "masked image modelling"
        elif classifier:
            kind = "fine-tuned classifier"
        else:
            kind = "EVA-CLIP" if has("head.weight") else "without head"
        if headless or has(mlp + "norm.weight", mlp + "fc1_g.weight", "blocks.0.attn.norm.weight"):
            kind += ", timm's names"
        entries = (
            (CLASSIFIER if classifier else HEADLESS if headless else ()) + (GATED if gated else GELU) + self.entries
        )
        return f"{self.name} ({kind})", entries

    def read_facts(self, tower: Tower) -> None:
        """Read sizes and, from the rotary tables, the number of heads."""
        tower.read_common_facts()
        if tower.facts["hidden_size"] == _POST_NORM_WIDTH:
            raise QLIPError(
                f"{tower.source.name}: a QLIP's blocks do not normalise after attention and MLP, as EVA-02-CLIP-E's do;"
                " take a B or L tower"
            )
        _, channels, tower.patch_size, _ = tower.shape_of(_EMBEDDINGS + "patch_embedding.weight", 4)
        try:
            tower.grid = grid_of(tower.tensors[_EMBEDDINGS + "position_embedding.weight"])
        except QLIPError as error:
            raise QLIPError(f"{tower.source.name}: {error}") from None
        tower.facts["num_channels"] = channels
        tower.facts["rope"] = bool(tower.facts["swiglu"])  # True for EVA-02, False for EVA-01
        if not tower.facts["swiglu"]:
            tower.facts["hidden_act"] = "gelu"
        _read_rope(tower)


EVA = Eva()


def _read_rope(tower: Tower) -> None:
    """Read the number of heads from the stored rotary tables, and compare the tables with a QLIP's."""
    tables: dict[str, Tensor] = {}
    for key, tensor in tower.source.tensors.items():
        if key.startswith(tower.prefix) and (found := re.search(r"rope\.freqs_(cos|sin)$", key)):
            tables.setdefault(found[1], tensor)
    if not tables:
        if tower.facts["rope"]:
            tower.notes.append(f"{NAMES['vision']}: the file holds no rotary tables; EVA-02's are assumed")
        return
    tower.facts["rope"] = True
    width, where = tower.facts["hidden_size"], f"{NAMES['vision']}: the file's rotary tables"
    shapes = {tuple(table.shape) for table in tables.values()}
    rows, lanes = next(iter(shapes)) if len(shapes) == 1 and len(next(iter(shapes))) == 2 else (0, 0)
    if not lanes or width % lanes or lanes % 4 or rows != tower.grid**2:
        tower.notes.append(f"{where} do not fit its grid and width; a QLIP's own are used, which may differ")
        return
    tower.facts["num_attention_heads"] = width // lanes
    ours = dict(zip(("cos", "sin"), rope_tables((tower.grid, tower.grid), lanes, 0), strict=True))
    worst = max(
        (table.float() - ours[name].repeat_interleave(2, -1)).abs().max().item() for name, table in tables.items()
    )
    if worst <= _ROPE_TOLERANCE:
        tower.notes.append(f"{where} equal a QLIP's (largest difference {worst:.1g})")
    else:
        tower.notes.append(
            f"{where} differ from a QLIP's by up to {worst:.2g}: its coordinates do not span 16 units per side, so"
            " attention computes something else until it is trained"
        )
