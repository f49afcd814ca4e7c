"""Checkpoints of Meta's lingua: ``params.json``, and weights whose order of rows is a `CausalModel`'s.

lingua stores its weights as a pickle, consolidated.pth, which is never loaded: they are read from a model.safetensors
with the same names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qlip.errors import QLIPError, validate
from qlip.files import write_text
from qlip.lm.causal_config import CausalConfig

FILE = "params.json"
"""Settings of a checkpoint, or of the run that wrote it, with the model's under "model"."""


class LinguaArgs(BaseModel):
    """Arguments of a lingua model; those of random weights have no effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int
    n_layers: int
    vocab_size: int
    head_dim: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seqlen: int = 1024
    weight_tying: bool = False
    sliding_window: None = None
    init_base_std: float | None = None
    init_std_factor: str = "disabled"
    seed: int = 42


def is_lingua(folder: Path) -> bool:
    """Return True if a folder has lingua's settings and no config.json."""
    return (folder / FILE).is_file() and not (folder / "config.json").is_file()


def lingua_config(folder: Path, shapes: Mapping[str, torch.Size]) -> CausalConfig:
    """Configuration of a checkpoint.

    Args:
        folder: with ``params.json``.
        shapes: of its tensors, by name: the settings name neither the width of the SwiGLU nor norms of queries and
            keys.

    Raises:
        QLIPError: the file is not JSON, an argument is missing, unknown or not supported, or a tensor is missing.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: not JSON ({error}); fetch the file again") from None
    inner = values.get("model", values) if isinstance(values, dict) else values
    args = validate(LinguaArgs, inner, str(path))
    heads = args.n_heads or args.dim // (args.head_dim or args.dim)
    if (gate := shapes.get("layers.0.feed_forward.w1.weight")) is None:
        raise QLIPError(f"{folder}: tensor 'layers.0.feed_forward.w1.weight' is missing; are the names lingua's?")
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": gate[0],
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.weight_tying,
        "max_position_embeddings": args.max_seqlen,
        "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
    }
    return validate(CausalConfig, sizes, str(path))


def write_params(folder: Path, config: CausalConfig) -> None:
    """Write ``params.json``.

    Raises:
        QLIPError: rotary frequencies that lingua does not know.
    """
    if config.rope_scaling is not None:
        raise QLIPError("rope_scaling: lingua has no scaled rotary frequencies; save a stock folder instead")
    args = LinguaArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        head_dim=config.head_width,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.kv_heads,
        ffn_dim_multiplier=(config.intermediate_size + 0.5) / int(8 * config.hidden_size / 3),  # rounded down there
        multiple_of=1,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        max_seqlen=config.length,
        weight_tying=config.tie_word_embeddings,
    )
    write_text(folder / FILE, json.dumps({"model": args.model_dump()}, indent=2) + "\n")


def lingua_weights(state: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    """Tensors of a `CausalModel` by lingua's names."""
    width = config.head_width
    sizes = (config.num_attention_heads * width, config.kv_heads * width, config.kv_heads * width)
    found = {name: one for name, one in state.items() if not name.endswith(".wqkv.weight")}
    for number in range(config.num_hidden_layers):
        prefix = f"layers.{number}.attention"
        parts = state[f"{prefix}.wqkv.weight"].split(sizes)
        found |= {f"{prefix}.w{part}.weight": one for part, one in zip("qkv", parts, strict=True)}
    return found


def own_lingua_weights(stored: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    """Tensors of lingua by a `CausalModel`'s names: the inverse of `lingua_weights`."""
    found = dict(stored)
    for number in range(config.num_hidden_layers):
        prefix = f"layers.{number}.attention"
        found[f"{prefix}.wqkv.weight"] = torch.cat([found.pop(f"{prefix}.w{part}.weight") for part in "qkv"])
    return found
