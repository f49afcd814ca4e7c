"""LlamaGen's published weights (https://github.com/FoundationVision/LlamaGen, MIT) to a `DecoderModel`, and back.

A published ``.pt`` is a pickle with the weights under ``model`` (DDP), ``module`` (DeepSpeed) or ``state_dict``, or
bare (FSDP), and the options of its training as an `argparse.Namespace`, the one class that is allowed in it. The sizes
follow from the tensors' shapes, except the number of heads and the grid; see :func:`read_llamagen`.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip.errors import QLIPError, nearest
from qlip.lm.config import SIZES, DecoderConfig
from qlip.lm.model import DecoderModel
from qlip.modeling.convert.weights_file import Source, read
from qlip.runtime.finite import require_finite

_NAMES = {
    "head.output.weight": "output.weight",
    "condition.embedding.weight": "cls_embedding.embedding_table.weight",
    "condition.fc1.weight": "cls_embedding.cap_proj.fc1.weight",
    "condition.fc2.weight": "cls_embedding.cap_proj.fc2.weight",
    "condition.uncond_embedding": "cls_embedding.uncond_embedding",
}
"""Our names of the tensors whose names differ, and LlamaGen's."""

_COMPUTED = re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache")
"""Tensors that sampling leaves in a model, which hold nothing learned."""

DEFAULT_GRID = (16, 16)


@dataclass(frozen=True)
class LlamaGen:
    """A decoder that was read from a file, and what was assumed.

    Attributes:
        model: in eval mode, float32.
        notes: one line for each fact that the file does not hold and that was assumed.
    """

    model: DecoderModel
    notes: list[str]


def read_llamagen(path: str | Path, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> LlamaGen:
    """Build a decoder from a file of LlamaGen's.

    Args:
        path: a ``.pt`` file, or a ``.safetensors`` file with the same names.
        heads: number of query heads; None is that of LlamaGen's size with these layers and this width.
        grid: rows and columns of tokens; None is what the file's options say, else 16 x 16.

    Raises:
        QLIPError: no such file, a broken one, one that holds Python objects, another model's, a tensor missing,
            unexpected, of another shape or not finite, or sizes that do not fit.
    """
    source = read(path, classes=(argparse.Namespace,))
    tensors = {name: one for name, one in source.tensors.items() if not _COMPUTED.fullmatch(name)}
    for name in ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise QLIPError(
                f"{path}: no decoder of LlamaGen: it has no matrix {name!r}; its files are t2i_*.pt, c2i_*.pt"
            )
    notes: list[str] = []
    config = _config(source, tensors, heads, grid, notes)
    with torch.device("meta"):
        model = DecoderModel(config)
    shapes = {_NAMES.get(name, name): one.shape for name, one in model.state_dict().items()}
    _check(str(path), tensors, shapes)
    ours = {theirs: name for name, theirs in _NAMES.items()}
    model.load_state_dict({ours.get(name, name): one.float() for name, one in tensors.items()}, assign=True)
    return LlamaGen(model.requires_grad_(True).eval(), notes)


def to_llamagen(model: DecoderModel) -> dict[str, Tensor]:
    """Return the weights under LlamaGen's names.

    Raises:
        QLIPError: a model that LlamaGen does not have.
    """
    config = model.config
    theirs: dict[str, Any] = {"rotary": "axial", "prefix_rotary": "zero", "num_groups": 1, "qk_norm": False}
    theirs |= {"rotary_base": 10000.0, "rms_norm_eps": 1e-5, "head_dim": None, "target_positions": False}
    found = {name: getattr(config, name) for name in theirs} | {
        "head_dim": None if config.head_width * config.num_attention_heads == config.hidden_size else config.head_dim
    }
    if config.head.kind != "flat":
        raise QLIPError(f"head {config.head.kind!r}: LlamaGen's decoders have a flat head")
    for name, value in theirs.items():
        if found[name] != value:
            raise QLIPError(f"{name} {found[name]!r}: LlamaGen's decoders have {value!r}")
    if config.condition == "tokens":
        raise QLIPError("condition 'tokens': LlamaGen's decoders have classes or features")
    return {_NAMES.get(name, name): one.detach() for name, one in model.state_dict().items()}


def _config(
    source: Source, tensors: dict[str, Tensor], heads: int | None, grid: tuple[int, int] | None, notes: list[str]
) -> DecoderConfig:
    """Configuration of a file's tensors and options."""
    values, width = tensors["tok_embeddings.weight"].shape
    layers = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name)))
    if heads is None:
        heads = next((size[2] for size in SIZES.values() if size[:2] == (layers, width)), None)
    if heads is None:
        raise QLIPError(
            f"{source.name}: {layers} layers of width {width} are no size of LlamaGen's, and no tensor tells the number"
            " of heads; give it"
        )
    if width % heads:
        raise QLIPError(f"{source.name}: {heads} heads do not divide the width {width}; give its number of heads")
    rows = tensors["layers.0.attention.wqkv.weight"].shape[0]
    kv_heads, rest = divmod((rows - width) * heads, 2 * width)
    if rest or kv_heads < 1 or heads % kv_heads:
        raise QLIPError(
            f"{source.name}: 'layers.0.attention.wqkv.weight' has {rows} rows, which fit no number of key-value heads"
            f" of width {width // heads}; give its number of heads"
        )
    condition: dict[str, Any]
    null = tensors.get("cls_embedding.uncond_embedding")
    table = tensors.get("cls_embedding.embedding_table.weight")
    if null is not None and null.ndim == 2:
        condition = {"condition": "features", "prefix_length": null.shape[0], "condition_size": null.shape[1]}
    elif table is not None:
        condition = {"condition": "class", "condition_size": table.shape[0] - 1}
    else:
        raise QLIPError(
            f"{source.name}: has neither 'cls_embedding.uncond_embedding' (features of text) nor"
            " 'cls_embedding.embedding_table.weight' (classes); fetch the file again"
        )
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "intermediate_size": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "rotary": "axial",
        "prefix_rotary": "zero",
        "grid": grid or _grid(source, notes),
        "codebook_size": values,
        "head": {"kind": "flat"},
        "embedding_dropout": 0.1,
        "residual_dropout": 0.1,
        "ffn_dropout": 0.1,
    }
    return DecoderConfig.from_dict(config | condition, source.name)


def _grid(source: Source, notes: list[str]) -> tuple[int, int]:
    """Rows and columns of tokens by the options in the file, else LlamaGen's for 256 pixels."""
    options = source.beside.get("args")
    size, patch = (getattr(options, name, None) for name in ("image_size", "downsample_size"))
    if isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size:
        return size // patch, size // patch
    notes.append(
        f"{source.name}: does not say its grid of tokens; taken as {DEFAULT_GRID[0]} x {DEFAULT_GRID[1]}, that of"
        " images of 256 pixels (384 pixels have 24 x 24, 512 have 32 x 32)"
    )
    return DEFAULT_GRID


def _check(path: str, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Refuse tensors that are missing, unexpected, of another shape, or not finite."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise QLIPError(f"{path}: unexpected tensor {name!r}{nearest(name, shapes)}; no decoder of LlamaGen has it")
        if tensor.shape != shapes[name]:
            raise QLIPError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, the others make it {tuple(shapes[name])}"
            )
        if not tensor.is_floating_point():
            raise QLIPError(f"{path}: tensor {name!r} has type {tensor.dtype}; only floating weights are read")
        require_finite(tensor[None], f"{path}: the weights of {name!r}", "this file is broken; fetch it again")
    if missing := sorted(shapes.keys() - tensors.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QLIPError(f"{path}: tensor {missing[0]!r}{more} is missing; fetch the file again")
