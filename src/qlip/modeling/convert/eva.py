"""EVA's image towers: EVA-01, EVA-02 and EVA-CLIP (baaivision/EVA), and the same under timm's names.

Published in several variants: with a GELU or a gated (SwiGLU) MLP, whose two matrices may be packed in one; pre-trained
by masked image modelling, as half of a CLIP, or fine-tuned as a classifier. `_variant` tells them apart by names.
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
from qlip.modeling.convert.rules import CLASS_TOKEN, NAMES, PATCHES, POSITIONS, Drop, Format, Rules, Tower, qkv

_POST_NORM_WIDTH = 1792  # EVA-02-CLIP-E normalises after attention and MLP, under the same names
_ROPE_TOLERANCE = 1e-2  # tables may be stored in bfloat16

_LAYER = "vision_model.encoder.layers.{n}."
_GATE_AND_VALUE = (_LAYER + "mlp.w1.{p}", _LAYER + "mlp.w2.{p}")
_LAYER_SCALE = Drop("a QLIP has no scale after each layer", refused=True)
_RELATIVE = Drop("a QLIP has no relative position bias", refused=True)
_ROPE = Drop("rotary table, recomputed")

_RULES: Rules = {
    "cls_token": CLASS_TOKEN,
    "pos_embed": POSITIONS,
    "patch_embed.proj.weight": PATCHES,
    "patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "blocks.{n}.norm1.{p}": _LAYER + "layer_norm1.{p}",
    "blocks.{n}.norm2.{p}": _LAYER + "layer_norm2.{p}",
    "blocks.{n}.attn.qkv.weight": qkv(_LAYER, "weight"),
    "blocks.{n}.attn.q_proj.{p}": _LAYER + "self_attn.q_proj.{p}",
    "blocks.{n}.attn.k_proj.{p}": _LAYER + "self_attn.k_proj.{p}",
    "blocks.{n}.attn.v_proj.{p}": _LAYER + "self_attn.v_proj.{p}",
    "blocks.{n}.attn.q_bias": _LAYER + "self_attn.q_proj.bias",
    "blocks.{n}.attn.v_bias": _LAYER + "self_attn.v_proj.bias",
    "blocks.{n}.attn.inner_attn_ln.{p}": _LAYER + "self_attn.inner_attn_ln.{p}",
    "blocks.{n}.attn.norm.{p}": _LAYER + "self_attn.inner_attn_ln.{p}",  # timm's name
    "blocks.{n}.attn.proj.{p}": _LAYER + "self_attn.out_proj.{p}",
    "blocks.{n}.mlp.w1.{p}": _LAYER + "mlp.w1.{p}",
    "blocks.{n}.mlp.w2.{p}": _LAYER + "mlp.w2.{p}",
    "blocks.{n}.mlp.w3.{p}": _LAYER + "mlp.w3.{p}",
    "blocks.{n}.mlp.ffn_ln.{p}": _LAYER + "mlp.ffn_ln.{p}",
    "blocks.{n}.mlp.norm.{p}": _LAYER + "mlp.ffn_ln.{p}",  # timm's name
    "norm.{p}": "vision_model.post_layernorm.{p}",
    "head.{p}": "visual_projection.{p}",
    "mask_token": Drop("marks hidden patches in masked image modelling only"),
    "lm_head.{p}": Drop("predicts features of hidden patches in masked image modelling only"),
    "rope.{rest}": _ROPE,
    "blocks.{n}.attn.rope.{rest}": _ROPE,
    "blocks.{n}.gamma_1": _LAYER_SCALE,
    "blocks.{n}.gamma_2": _LAYER_SCALE,
    "rel_pos_bias.{rest}": _RELATIVE,
    "blocks.{n}.attn.relative_position_{rest}": _RELATIVE,
    "blocks.{n}.attn.rel_pos_bias.{rest}": _RELATIVE,
}
_GELU: Rules = {
    "blocks.{n}.mlp.fc1.{p}": _LAYER + "mlp.fc1.{p}",
    "blocks.{n}.mlp.fc2.{p}": _LAYER + "mlp.fc2.{p}",
}
_GATED: Rules = {
    "blocks.{n}.mlp.w12.{p}": _GATE_AND_VALUE,
    "blocks.{n}.mlp.fc1.{p}": _GATE_AND_VALUE,
    "blocks.{n}.mlp.fc1_g.{p}": _LAYER + "mlp.w1.{p}",
    "blocks.{n}.mlp.fc1_x.{p}": _LAYER + "mlp.w2.{p}",
    "blocks.{n}.mlp.fc2.{p}": _LAYER + "mlp.w3.{p}",
}
_CLASSIFIER: Rules = {
    "fc_norm.{p}": Drop("norm of a classifier's averaged patches"),
    "head.{p}": Drop("a classifier over averaged patches, not a projection of [CLS]"),
}
_HEADLESS: Rules = {"fc_norm.{p}": "vision_model.post_layernorm.{p}"}


def _variant(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, Rules]:
    """Name and rules of the variant that a file holds."""

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
    ending = _CLASSIFIER if classifier else _HEADLESS if headless else {}
    return f" ({kind})", {**ending, **(_GATED if gated else _GELU)}


def _read_facts(tower: Tower) -> None:
    """Read sizes and, from the rotary tables, the number of heads."""
    tower.read_common_facts(eps=1e-6)
    if tower.facts["hidden_size"] == _POST_NORM_WIDTH:
        raise QLIPError(
            f"{tower.source.name}: a QLIP's blocks do not normalise after attention and MLP, as EVA-02-CLIP-E's do;"
            " take a B or L tower"
        )
    _, channels, tower.patch_size, _ = tower.shape_of(PATCHES, 4)
    try:
        tower.grid = grid_of(tower.tensors[POSITIONS])
    except QLIPError as error:
        raise QLIPError(f"{tower.source.name}: {error}") from None
    tower.facts["num_channels"] = channels
    tower.facts["rope"] = bool(tower.facts["swiglu"])  # True for EVA-02, False for EVA-01
    if not tower.facts["swiglu"]:
        tower.facts["hidden_act"] = "gelu"
    _read_rope(tower)


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


EVA = Format(
    part="vision",
    name="EVA image tower",
    prefixes=("visual.trunk.", "visual.", ""),
    anchors=("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"),
    rules=_RULES,
    read_facts=_read_facts,
    variant=_variant,
)
