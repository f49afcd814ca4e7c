"""CLIP's text tower, as OpenCLIP (mlfoundations/open_clip), EVA-CLIP and OpenAI publish it.

A QLIP's text tower is causal. No file says whether its tower is, so towers of SigLIP and CLIPA, which are not, are
recognised by their vocabularies and by SigLIP's biased projection. OpenCLIP's image towers are not taken: they have a
norm before the blocks, for which a QLIP has no parameters.
"""

from __future__ import annotations

from collections.abc import Collection

from qlip.errors import QLIPError
from qlip.modeling.convert.rules import NAMES, Drop, Entries, Format, Rule, Tower, block_rules, qkv

_OPENAI = ("input_resolution", "context_length", "vocab_size")
_WITHOUT_MASK = {32_000: "CLIPA's or SigLIP's", 250_000: "SigLIP's", 256_000: "SigLIP 2's"}
"""Vocabulary sizes of published text towers without a causal mask."""

_BLOCK, _LAYER = "transformer.resblocks.{n}.", "text_model.encoder.layers.{n}."
_LAYER_SCALE = "a QLIP has no scale after each layer"

ENTRIES: Entries = (
    Rule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
    Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    Rule(_BLOCK + "attn.in_proj_weight", qkv(_LAYER, "weight"), "split"),
    Rule(_BLOCK + "attn.in_proj_bias", qkv(_LAYER, "bias"), "split"),
    *block_rules(
        _BLOCK,
        _LAYER,
        {
            "ln_1.{p}": "layer_norm1.{p}",
            "ln_2.{p}": "layer_norm2.{p}",
            "attn.out_proj.{p}": "self_attn.out_proj.{p}",
            "mlp.c_fc.{p}": "mlp.fc1.{p}",
            "mlp.c_proj.{p}": "mlp.fc2.{p}",
        },
    ),
    Rule("ln_final.{p}", ("text_model.final_layer_norm.{p}",)),
    Rule("text_projection", ("text_projection.weight",), "transposed"),
    Rule("text_projection.{p}", ("text_projection.{p}",)),
    Drop(_BLOCK + "ls_1.gamma", _LAYER_SCALE, refused=True),
    Drop(_BLOCK + "ls_2.gamma", _LAYER_SCALE, refused=True),
    Drop("attn_mask", "causal mask, recomputed"),
)

BESIDE: tuple[Drop, ...] = (
    Drop("logit_bias", "a QLIP's logits have no bias"),
    Drop("attn_mask", "causal mask, recomputed"),
    Drop("position_ids", "recomputed"),
    Drop("text.transformer.embeddings.position_ids", "recomputed"),
    *(Drop(name, "a number in OpenAI's files, not a weight") for name in _OPENAI),
)
"""Names of a whole CLIP's file that belong to no tower."""

TEMPERATURE = ("logit_scale", "text.logit_scale")
"""Names of the temperature's logarithm; the second is in EVA-CLIP's older files."""


class ClipText(Format):
    """CLIP's names of a text tower."""

    part = "text"
    name = "EVA-CLIP or OpenCLIP text tower"
    prefixes = ("text.", "")
    anchors = (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight",
    )
    entries = ENTRIES

    def read_facts(self, tower: Tower) -> None:
        """Read sizes. CLIP pools at the largest id, which is the last of its vocabulary.

        Raises:
            QLIPError: a tensor of an impossible shape, or a tower without a causal mask.
        """
        tower.read_common_facts()
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


CLIP_TEXT = ClipText()


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
