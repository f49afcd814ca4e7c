"""Weights as other projects name them, at a thousandth of the size, and literal forwards of those architectures.

Names and shapes are read from fixtures/convert, which were written from the projects' public sources. The forwards
below compute from the projects' own names, by their published descriptions (EVA-02, arXiv 2303.11331; EVA-CLIP, arXiv
2303.15389; CLIP, arXiv 2103.00020), and share no line with ``qlip.modeling``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIXTURES = Path(__file__).parent.parent / "fixtures" / "convert"
PROJECTS = sorted(path.stem for path in FIXTURES.glob("*.json"))

State = dict[str, Tensor]

SIZES: dict[str, int] = {
    "width": 32,
    "depth": 3,
    "heads": 2,
    "hidden": 40,
    "patch": 7,
    "grid": 4,
    "features": 24,
    "shared": 16,
    "text_width": 24,
    "text_depth": 2,
    "text_heads": 3,
    "text_hidden": 48,
    "length": 10,
    "vocabulary": 60,
}


def published_sizes(project: str) -> dict[str, int]:
    """The sizes of the published model."""
    sizes: dict[str, int] = json.loads((FIXTURES / f"{project}.json").read_text())["published"]
    return sizes


def shapes(project: str, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every key of a project's model and its shape."""
    keys: dict[str, list[int | str]] = json.loads((FIXTURES / f"{project}.json").read_text())["keys"]
    known = sizes | {
        "cells": sizes["grid"] ** 2,
        "tokens": sizes["grid"] ** 2 + 1,
        "head": sizes["width"] // sizes["heads"],
        "triple": 3 * sizes["width"],
        "packed": 2 * sizes["hidden"],
        "text_triple": 3 * sizes.get("text_width", 0),
    }
    found = {}
    for pattern, dims in keys.items():
        shape = tuple(known[dim] if isinstance(dim, str) else dim for dim in dims)
        mark, depth = ("{n}", "depth") if "{n}" in pattern else ("{m}", "text_depth")
        repeats = sizes[depth] if mark in pattern else 1
        found.update({pattern.replace(mark, str(layer)): shape for layer in range(repeats)})
    return found


def make(project: str, seed: int = 0, **changes: int) -> State:
    """Random weights under a project's names; rotary tables as that project computes them."""
    sizes = SIZES | changes
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(project, sizes).items():
        if "freqs_" in key:
            cos, sin = eva_rope(sizes["grid"], sizes["width"] // sizes["heads"])
            state[key] = cos if key.endswith("cos") else sin
        elif key == "logit_scale":
            state[key] = torch.tensor(math.log(37.0))
        else:
            spread = 0.3 if len(shape) < 2 else 1.2 / math.sqrt(shape[-1])
            state[key] = torch.randn(shape, generator=generator) * spread
            if "norm" in key.lower() or "ln" in key:
                state[key] += float(key.endswith("weight"))
    return state


def eva_rope(grid: int, head: int, span: int = 16) -> tuple[Tensor, Tensor]:
    """EVA's tables, (grid * grid, head): coordinates stretched to a ``span``, rows in the first half."""
    half = head // 2
    frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(0, half, 2)])
    angles = torch.zeros(grid, grid, head)
    for row in range(grid):
        for column in range(grid):
            for lane in range(half):
                angles[row, column, lane] = row / grid * span * frequencies[lane // 2]
                angles[row, column, half + lane] = column / grid * span * frequencies[lane // 2]
    return angles.view(grid * grid, head).cos(), angles.view(grid * grid, head).sin()


def rotate_half(x: Tensor) -> Tensor:
    turned = torch.empty_like(x)
    turned[..., 0::2] = -x[..., 1::2]
    turned[..., 1::2] = x[..., 0::2]
    return turned


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[name + ".weight"] + state[name + ".bias"]
    )


def eva_tower(
    state: State, pixels: Tensor, prefix: str = "", heads: int = 2, inner_norm_of_ones: bool = False
) -> list[Tensor]:
    """An EVA image tower: hidden states from the embeddings on, (B, 1 + N, D) each, no final norm.

    Args:
        state: under EVA's names.
        pixels: of the trained size.
        prefix: before every name.
        heads: of attention.
        inner_norm_of_ones: put a norm of weight 1 and bias 0 before ``attn.proj``, which a QLIP has and EVA-02's
            masked-image-modelling towers have not.
    """
    s = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((s["cls_token"].expand(len(x), -1, -1), x), 1) + s["pos_embed"]
    states = [x]
    depth = len({key.split(".")[1] for key in s if key.startswith("blocks.")})
    for layer in range(depth):
        b = {
            key.removeprefix(f"blocks.{layer}."): value
            for key, value in s.items()
            if key.startswith(f"blocks.{layer}.")
        }
        x = x + eva_attention(b, norm(b, "norm1", x, 1e-6), heads, s, inner_norm_of_ones)
        x = x + eva_mlp(b, norm(b, "norm2", x, 1e-6))
        states.append(x)
    return states


def eva_attention(b: State, x: Tensor, heads: int, tower: State, inner_norm_of_ones: bool) -> Tensor:
    batch, tokens, width = x.shape
    if "attn.qkv.weight" in b:
        bias = torch.cat((b["attn.q_bias"], torch.zeros(width), b["attn.v_bias"]))
        q, k, v = (x @ b["attn.qkv.weight"].t() + bias).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    else:
        q = x @ b["attn.q_proj.weight"].t() + b.get("attn.q_bias", b.get("attn.q_proj.bias"))
        k = x @ b["attn.k_proj.weight"].t()
        v = x @ b["attn.v_proj.weight"].t() + b.get("attn.v_bias", b.get("attn.v_proj.bias"))
        q, k, v = (t.view(batch, tokens, heads, -1).transpose(1, 2) for t in (q, k, v))
    if "rope.freqs_cos" in tower:
        cos, sin = tower["rope.freqs_cos"], tower["rope.freqs_sin"]
        q, k = (torch.cat((t[:, :, :1], t[:, :, 1:] * cos + rotate_half(t[:, :, 1:]) * sin), 2) for t in (q, k))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    x = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
    if "attn.inner_attn_ln.weight" in b:
        x = norm(b, "attn.inner_attn_ln", x, 1e-6)
    elif inner_norm_of_ones:
        x = norm({"ones.weight": torch.ones(width), "ones.bias": torch.zeros(width)}, "ones", x, 1e-6)
    return x @ b["attn.proj.weight"].t() + b["attn.proj.bias"]


def eva_mlp(b: State, x: Tensor) -> Tensor:
    if "mlp.fc1.weight" in b:
        x = F.gelu(x @ b["mlp.fc1.weight"].t() + b["mlp.fc1.bias"])
        return x @ b["mlp.fc2.weight"].t() + b["mlp.fc2.bias"]
    if "mlp.w12.weight" in b:
        gate, value = (x @ b["mlp.w12.weight"].t() + b["mlp.w12.bias"]).chunk(2, -1)
    else:
        gate, value = x @ b["mlp.w1.weight"].t() + b["mlp.w1.bias"], x @ b["mlp.w2.weight"].t() + b["mlp.w2.bias"]
    x = gate * torch.sigmoid(gate) * value
    if "mlp.ffn_ln.weight" in b:
        x = norm(b, "mlp.ffn_ln", x, 1e-6)
    return x @ b["mlp.w3.weight"].t() + b["mlp.w3.bias"]


def eva_embedding(state: State, pixels: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """EVA-CLIP's normed [CLS], and its projection."""
    cls = norm(state, prefix + "norm", eva_tower(state, pixels, prefix)[-1][:, 0], 1e-6)
    return cls, cls @ state[prefix + "head.weight"].t() + state[prefix + "head.bias"]


def from_timm(state: State) -> State:
    """timm's names as EVA's, for the forward: what timm's own loader of EVA's files does, the other way round."""
    names = {
        "mlp.norm": "mlp.ffn_ln",
        "attn.norm": "attn.inner_attn_ln",
        "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2",
        "mlp.fc2": "mlp.w3",
    }
    renamed = {}
    for key, value in state.items():
        for theirs, eva in names.items():
            key = key.replace(theirs, eva)
        renamed[key] = value
    return renamed


def clip_blocks(state: State, prefix: str, x: Tensor, heads: int, quick: bool, mask: Tensor | None) -> Tensor:
    """OpenCLIP's residual blocks, (B, N, D), with PyTorch's own attention module."""
    width = x.shape[-1]
    depth = len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
    for layer in range(depth):
        b = {
            key.removeprefix(f"{prefix}{layer}."): v for key, v in state.items() if key.startswith(f"{prefix}{layer}.")
        }
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({key.removeprefix("attn."): v for key, v in b.items() if key.startswith("attn.")})
        normed = F.layer_norm(x, (width,), b["ln_1.weight"], b["ln_1.bias"])
        x = x + attention(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        hidden = F.linear(
            F.layer_norm(x, (width,), b["ln_2.weight"], b["ln_2.bias"]), b["mlp.c_fc.weight"], b["mlp.c_fc.bias"]
        )
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        x = x + F.linear(hidden, b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
    return x


@torch.no_grad()
def clip_text(
    state: State, ids: Tensor, prefix: str = "", heads: int = 3, quick: bool = False
) -> tuple[Tensor, Tensor]:
    """CLIP's text tower: every position behind the final norm, and the projected embedding."""
    length = ids.shape[1]
    x = state[prefix + "token_embedding.weight"][ids] + state[prefix + "positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = clip_blocks(state, prefix + "transformer.resblocks.", x, heads, quick, mask)
    x = F.layer_norm(x, (x.shape[-1],), state[prefix + "ln_final.weight"], state[prefix + "ln_final.bias"])
    return x, x[torch.arange(len(x)), ids.argmax(-1)] @ state[prefix + "text_projection"]


def config_of(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A config.json for the small towers, as a user would write it: EVA-02-CLIP's flags unless changed."""
    tower = {
        "hidden_size": SIZES["width"],
        "intermediate_size": SIZES["hidden"],
        "num_hidden_layers": SIZES["depth"],
        "num_attention_heads": SIZES["heads"],
        "image_size": SIZES["patch"] * SIZES["grid"],
        "patch_size": SIZES["patch"],
        "layer_norm_eps": 1e-6,
        "k_bias": False,
        "rope": True,
        "subln": True,
        "swiglu": True,
    } | (vision or {})
    bottleneck = {
        "quantizer": "bsq",
        "quantizer_l2_norm": True,
        "quantizer_embed_type": "mlp",
        "quantizer_cfg": {"embed_dim": 12, "group_size": 4, "input_format": "blc", "l2_norm": True},
    }
    words = {
        "hidden_size": SIZES["text_width"],
        "intermediate_size": SIZES["text_hidden"],
        "num_hidden_layers": SIZES["text_depth"],
        "num_attention_heads": SIZES["text_heads"],
        "max_position_embeddings": SIZES["length"],
        "vocab_size": SIZES["vocabulary"],
        "bos_token_id": SIZES["vocabulary"] - 2,
        "eos_token_id": SIZES["vocabulary"] - 1,
    } | (text or {})
    return {
        "projection_dim": SIZES["shared"],
        "vision_projection_bias": True,
        "text_projection_bias": False,
        "vision_config": tower | bottleneck,
        "decoder_config": {**tower},
        "text_config": words,
    } | top
