"""CLIP's text tower, as OpenCLIP (mlfoundations/open_clip), EVA-CLIP and OpenAI publish it.

A QLIP's text tower is causal. No file says whether its tower is, so towers of SigLIP and CLIPA, which are not, are
recognised by their vocabularies and by SigLIP's biased projection. OpenCLIP's image towers are not taken: they have a
norm before the blocks, for which a QLIP has no parameters.
"""

from __future__ import annotations

from collections.abc import Collection

from qlip.errors import QLIPError
from qlip.modeling.convert.rules import NAMES, Drop, Format, Rules, Tower, Transposed, qkv

_OPENAI = ("input_resolution", "context_length", "vocab_size")
_WITHOUT_MASK = {32_000: "CLIPA's or SigLIP's", 250_000: "SigLIP's", 256_000: "SigLIP 2's"}
"""Vocabulary sizes of published text towers without a causal mask."""

_BLOCK, _LAYER = "transformer.resblocks.{n}.", "text_model.encoder.layers.{n}."
_LAYER_SCALE = Drop("a QLIP has no scale after each layer", refused=True)
_MASK = Drop("causal mask, recomputed")
_RECOMPUTED = Drop("recomputed")

_RULES: Rules = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    _BLOCK + "ln_1.{p}": _LAYER + "layer_norm1.{p}",
    _BLOCK + "ln_2.{p}": _LAYER + "layer_norm2.{p}",
    _BLOCK + "attn.in_proj_weight": qkv(_LAYER, "weight"),
    _BLOCK + "attn.in_proj_bias": qkv(_LAYER, "bias"),
    _BLOCK + "attn.out_proj.{p}": _LAYER + "self_attn.out_proj.{p}",
    _BLOCK + "mlp.c_fc.{p}": _LAYER + "mlp.fc1.{p}",
    _BLOCK + "mlp.c_proj.{p}": _LAYER + "mlp.fc2.{p}",
    _BLOCK + "ls_1.gamma": _LAYER_SCALE,
    _BLOCK + "ls_2.gamma": _LAYER_SCALE,
    "ln_final.{p}": "text_model.final_layer_norm.{p}",
    "text_projection": Transposed("text_projection.weight"),
    "text_projection.{p}": "text_projection.{p}",
    "attn_mask": _MASK,
}
BESIDE: dict[str, Drop] = {
    "logit_bias": Drop("a QLIP's logits have no bias"),
    "attn_mask": _MASK,
    "position_ids": _RECOMPUTED,
    "text.transformer.embeddings.position_ids": _RECOMPUTED,
    **dict.fromkeys(_OPENAI, Drop("a number in OpenAI's files, not a weight")),
}
"""Names of a whole CLIP's file that belong to no tower."""

TEMPERATURE = ("logit_scale", "text.logit_scale")
"""Names of the temperature's logarithm; the second is in EVA-CLIP's older files."""


def _read_facts(tower: Tower) -> None:
    """Read sizes. CLIP pools at the largest id, which is the last of its vocabulary.

    Raises:
        QLIPError: a tensor of an impossible shape, or a tower without a causal mask.
    """
    tower.read_common_facts(eps=1e-5)
    vocabulary, _ = tower.shape_of("text_model.embeddings.token_embedding.weight", 2)
    biased = "text_projection.bias" in tower.tensors
    if vocabulary in _WITHOUT_MASK or biased:
        whose = _WITHOUT_MASK.get(vocabulary, "SigLIP's")
        shown = "a projection with a bias" if biased else f"a vocabulary of {vocabulary}"
        raise QLIPError(
            f"{tower.source.name}: has {shown}, as {whose} text towers, whose attention sees the whole text; a"
            " QLIP's is causal and would compute something else: take CLIP's, OpenCLIP's or EVA-CLIP's text tower"
        )
    tower.notes.append(
        f"{NAMES['text']}: attention is taken to be causal, as CLIP's; the file does not say it"
        " (MobileCLIP-S1's and S2's is not)"
    )
    length, _ = tower.shape_of("text_model.embeddings.position_embedding.weight", 2)
    tower.facts |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


CLIP_TEXT = Format(
    part="text",
    name="EVA-CLIP or OpenCLIP text tower",
    prefixes=("text.", ""),
    anchors=(
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight",
    ),
    rules=_RULES,
    read_facts=_read_facts,
)


def choose_activation(tower: Tower, quick_gelu: bool | None) -> None:
    """Set ``hidden_act``, which no file holds; ``quick_gelu`` None chooses QuickGELU for OpenAI's own files only."""
    openai = all(name in tower.source.tensors for name in _OPENAI)
    if quick_gelu is not None:
        why = "as requested"
    elif openai:
        why = "OpenAI's file"
    else:
        why = "the default; OpenAI's, DFN's and MetaCLIP's weights need QuickGELU"
    tower.facts["hidden_act"] = "quick_gelu" if (openai if quick_gelu is None else quick_gelu) else "gelu"
    tower.notes.append(f"{NAMES['text']}: hidden_act {tower.facts['hidden_act']} ({why}); the file does not say it")


def is_image_tower(keys: Collection[str]) -> bool:
    """True if a file holds OpenCLIP's image tower, bare or under ``visual.``."""
    names = ("conv1.weight", "class_embedding", "ln_pre.weight")
    return any(all(prefix + name in keys for name in names) for prefix in ("visual.", ""))
