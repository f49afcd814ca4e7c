"""Export of decoders as folders that plain transformers loads: Llama, Qwen3, and Csm for depth heads.

The arithmetic is theirs already, so an export renames and permutes: here adjacent lanes are a rotary pair, there lanes
i and i + d/2, which is a permutation of the rows of the query and key projections. Frequencies that no stock
configuration names are written as factors of its "longrope". The exported ids are those of the condition, the null
condition's last, and then (llama, qwen3) id = first + k V + v for value v of group k; a csm model has ids of its own
for each group. `check_export` says what has no stock form.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from qlip.errors import QLIPError, require
from qlip.files import folder_written_aside
from qlip.lm.conditions import Condition, FeatureCondition
from qlip.lm.config import DecoderConfig
from qlip.lm.export.readme import readme
from qlip.lm.heads import DepthHead, FlatHead, depth_ffn_width
from qlip.lm.model import DecoderModel
from qlip.lm.rotary import wavelengths
from qlip.modeling.checkpoint import save_weights

Format = Literal["llama", "qwen3", "csm"]
FORMATS: tuple[Format, ...] = get_args(Format)

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "csm": "CsmForConditionalGeneration"}
"""Class of transformers by format."""

_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""Names in a `DecoderBlock`, and in a layer of Llama, Qwen3 and Csm, of tensors that are equal."""

_CODEC = {
    "model_type": "mimi",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_filters": 1,
    "num_residual_layers": 1,
    "compress": 1,
    "upsampling_ratios": [2],
    "upsample_groups": 8,
    "num_quantizers": 2,
    "codebook_size": 2,
    "codebook_dim": 2,
    "vector_quantization_hidden_dimension": 2,
}
"""The smallest audio codec that a Csm can hold; it must hold one, and nothing here uses it."""


def check_export(config: DecoderConfig, format: Format) -> None:
    """Refuse a decoder that a format cannot hold exactly.

    Raises:
        QLIPError: says why, and which format fits if one does.
    """
    kind, head = config.head.kind, "depth" if format == "csm" else "flat"
    if kind not in ("flat", "depth"):
        raise QLIPError(f"head {kind!r}: no stock architecture has it; heads flat and depth can be exported")
    if kind != head:
        fits = "llama or qwen3" if kind == "flat" else "csm"
        raise QLIPError(f"head {kind!r}: {CLASSES[format]} has a head of kind {head}; export it as {fits}")
    if config.target_positions:
        raise QLIPError("target_positions, for random order: no stock architecture has them")
    if config.rotary == "axial":
        raise QLIPError(
            "rotary 'axial': positions on a grid of rows and columns are not 1-D, and no stock architecture has them"
        )
    still = config.prefix_rotary == "identity" and config.prefix_length > 1  # a single position has angle 0 anyway
    if config.prefix_rotary == "zero" or still:
        raise QLIPError(f"prefix_rotary {config.prefix_rotary!r}: stock architectures rotate a prefix by its positions")
    if config.qk_norm != (format == "qwen3"):
        if format == "csm":
            raise QLIPError(f"qk_norm: {CLASSES[format]} has no norm of queries and keys")
        fits = "qwen3" if config.qk_norm else "llama"
        raise QLIPError(f"qk_norm {str(config.qk_norm).lower()}: does not fit {CLASSES[format]}; export it as {fits}")
    if format == "csm" and config.num_groups == 1:
        raise QLIPError(f"num_groups 1: {CLASSES[format]} needs two groups or more")
    if format == "llama" and config.hidden_size % config.num_attention_heads:
        raise QLIPError(
            f"hidden_size {config.hidden_size}: {CLASSES[format]} needs a multiple of its number of attention heads,"
            f" {config.num_attention_heads}"
        )


def holds(config: DecoderConfig, format: Format) -> bool:
    """Return whether a format holds a decoder exactly."""
    try:
        check_export(config, format)
    except QLIPError:
        return False
    return True


@torch.no_grad()
def export_decoder(model: DecoderModel, format: Format, folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write a folder that transformers loads by itself, with a README.md of runnable code.

    A decoder of features gets ``condition.safetensors`` too, whose matrices make the prefix.

    Args:
        model: with a flat head (llama, qwen3) or a depth head (csm).
        format: "llama", "qwen3" (for a model with QK-norm) or "csm".
        folder: created if absent.
        dtype: of the written weights.

    Returns:
        The written files, sorted by name.

    Raises:
        QLIPError: the format cannot hold this model exactly, or csm without the package transformers.
    """
    check_export(model.config, format)
    if format == "csm":
        require("transformers", extra="hf")
    prompts = _prompt_rows(model)
    config = _config(model.config, format, len(prompts), dtype)
    weights = _csm(model, prompts) if format == "csm" else _causal(model, prompts)
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(_generation(model.config, format, len(prompts)), indent=2) + "\n",
        "README.md": readme(model.config, CLASSES[format], len(prompts)),
    }
    with folder_written_aside(folder) as aside:
        save_weights(weights, aside, dtype)
        if isinstance(model.condition, FeatureCondition):
            matrices = {name: one.to("cpu", dtype).contiguous() for name, one in model.condition.state_dict().items()}
            (aside / "condition.safetensors").write_bytes(save(matrices, {"format": "pt"}))
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        written = sorted(path.name for path in aside.iterdir())
    return [folder / name for name in written]


# ---------------------------------------------------------------- weights


def stock_layer(block: Mapping[str, Tensor], sizes: tuple[int, int, int], head_width: int) -> dict[str, Tensor]:
    """Weights of a `DecoderBlock` as those of a layer of Llama, Qwen3 or Csm.

    Args:
        block: the block's state dict.
        sizes: rows of its queries, keys and values.
        head_width: d.
    """
    found = {theirs: block[ours] for ours, theirs in _LAYER.items()}
    q, k, v = block["attention.wqkv.weight"].split(sizes)
    found["self_attn.q_proj.weight"] = halves(q, head_width)
    found["self_attn.k_proj.weight"] = halves(k, head_width)
    found["self_attn.v_proj.weight"] = v
    for name in ("q_norm", "k_norm"):
        if f"attention.{name}.weight" in block:
            found[f"self_attn.{name}.weight"] = halves(block[f"attention.{name}.weight"], head_width)
    return found


def block_of_stock_layer(layer: Mapping[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Weights of a layer of Llama or Qwen3 as those of a `DecoderBlock`: the inverse of `stock_layer`."""
    found = {ours: layer[theirs] for ours, theirs in _LAYER.items()}
    q, k = (adjacent(layer[f"self_attn.{name}_proj.weight"], head_width) for name in "qk")
    found["attention.wqkv.weight"] = torch.cat([q, k, layer["self_attn.v_proj.weight"]])
    for name in ("q_norm", "k_norm"):
        if f"self_attn.{name}.weight" in layer:
            found[f"attention.{name}.weight"] = adjacent(layer[f"self_attn.{name}.weight"], head_width)
    return found


def halves(rows: Tensor, width: int) -> Tensor:
    """Permute rows of heads (H d, ...) from pairs of adjacent lanes to pairs of lanes i and i + d/2."""
    pairs: Tensor = rows.unflatten(0, (-1, width // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def adjacent(rows: Tensor, width: int) -> Tensor:
    """Permute rows of heads (H d, ...) from pairs of lanes i and i + d/2 to pairs of adjacent lanes."""
    pairs: Tensor = rows.unflatten(0, (-1, 2, width // 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _prompt_rows(model: DecoderModel) -> Tensor:
    """Embeddings of the ids of prompts, the null condition's last: one row, or with features one per position."""
    condition = model.condition
    if isinstance(condition, FeatureCondition):
        null: Tensor = condition(Condition(condition.uncond_embedding[None])).embeddings[0]
        return null  # (T, D)
    rows: Tensor = condition.embedding.weight  # type: ignore[attr-defined]
    return rows  # (C + 1, D)


def _group_rows(model: DecoderModel) -> Tensor:
    """Input embeddings with a row per (group, value), (K V, D)."""
    rows = model.tok_embeddings.weight
    return rows.repeat(model.config.num_groups, 1) if model.config.shared_embeddings else rows


def _layers(layers: torch.nn.ModuleList, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, block in enumerate(layers):
        attention: Any = block.attention
        layer = stock_layer(block.state_dict(), attention.sizes, attention.sizes[0] // attention.heads)
        found |= {f"{prefix}.layers.{number}.{name}": one for name, one in layer.items()}
    return found


def _causal(model: DecoderModel, prompts: Tensor) -> dict[str, Tensor]:
    """Weights of a `LlamaForCausalLM` or `Qwen3ForCausalLM`."""
    assert isinstance(model.head, FlatHead)
    outputs = model.head.output.weight
    return _layers(model.layers, "model") | {
        "model.embed_tokens.weight": torch.cat([prompts, _group_rows(model)]),
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": torch.cat([torch.zeros_like(prompts), outputs]),  # prompt ids are never drawn
    }


def _csm(model: DecoderModel, prompts: Tensor) -> dict[str, Tensor]:
    """Weights of a `CsmForConditionalGeneration`."""
    head = model.head
    assert isinstance(head, DepthHead)
    backbone, depth = "backbone_model", "depth_decoder.model"
    found = _layers(model.layers, backbone) | _layers(head.layers, depth) | _codec()
    return found | {
        f"{backbone}.embed_tokens.embed_audio_tokens.weight": _group_rows(model),
        f"{backbone}.norm.weight": model.norm.weight,
        "embed_text_tokens.weight": prompts,
        "lm_head.weight": head.output.weight,
        f"{depth}.embed_tokens.weight": head.embedding.weight,
        f"{depth}.inputs_embeds_projector.weight": head.projector.weight,
        f"{depth}.norm.weight": head.norm.weight,
        "depth_decoder.codebooks_head.weight": head.outputs.transpose(1, 2),
    }


def _codec() -> dict[str, Tensor]:
    """Zeros for the audio codec, under the names by which transformers stores them."""
    transformers = require("transformers", extra="hf")
    codec = transformers.MimiModel(transformers.MimiConfig(**_CODEC))
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # a progress bar
        codec.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    return {f"codec_model.{name}": torch.zeros_like(one) for name, one in stored.items()}


# ---------------------------------------------------------------- JSON


def _config(config: DecoderConfig, format: Format, num_prompts: int, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``."""
    found: dict[str, Any] = {
        "architectures": [CLASSES[format]],
        "model_type": format,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.length,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_rotary(config),
    }
    values, groups = config.codebook_size, config.num_groups
    tokens = {"grid": list(config.grid), "num_groups": groups, "codebook_size": values}
    found["image_tokens"] = tokens | {"code_fingerprint": config.code_fingerprint}
    if format != "csm":
        found["image_tokens"]["first_id"] = num_prompts
        return found | {"vocab_size": num_prompts + groups * values, "tie_word_embeddings": False}
    depth = {
        "model_type": "csm_depth_decoder_model",
        "num_codebooks": groups,
        "vocab_size": values,
        "backbone_hidden_size": config.hidden_size,
        "hidden_size": config.head_size,
        "intermediate_size": depth_ffn_width(config.head_size),
        "num_hidden_layers": config.head.num_layers,
        "num_attention_heads": config.head.num_attention_heads,
        "num_key_value_heads": config.head.num_attention_heads,
        "head_dim": config.head_size // config.head.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": groups + 1,
        "rope_theta": config.rotary_base,
    }
    return found | {
        "vocab_size": values,
        "text_vocab_size": num_prompts,
        "num_codebooks": groups,
        "tie_codebooks_embeddings": False,
        "codebook_pad_token_id": None,
        "codebook_eos_token_id": values,  # no value of a group: nothing ends an image early
        "audio_token_id": None,
        "audio_eos_token_id": None,
        "depth_decoder_config": depth,
        "codec_config": _CODEC,
    }


def _rotary(config: DecoderConfig) -> dict[str, Any]:
    """Rotary settings, in the form that transformers 4 and 5 read."""
    if config.rotary == "1d":
        return {"rope_theta": config.rotary_base}
    factors = list(wavelengths(config))  # of the frequencies 1, 1, ... of base 1
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    length = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": config.length}
    return {"rope_theta": 1.0, "rope_scaling": scaling | length}


def _generation(config: DecoderConfig, format: Format, num_prompts: int) -> dict[str, Any]:
    """``generation_config.json``: plain sampling of a whole image."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    found: dict[str, Any] = plain | {"max_new_tokens": config.num_steps}
    found |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if format == "csm":
        inner = plain | {"min_new_tokens": config.num_groups - 1, "max_new_tokens": config.num_groups - 1}
        return found | {f"depth_decoder_{name}": value for name, value in inner.items()}
    if config.num_groups == 1:
        found["suppress_tokens"] = list(range(num_prompts))
    return found
