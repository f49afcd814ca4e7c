"""A second, literal forward of QLIP: the slow twin that the model is held equal to, forward and backward.

It is written straight from the numeric contract and shares no line with ``qlip.modeling``: separate q, k and v
products, an explicit softmax with ``finfo.min`` masks, pair rotations for RoPE, and both entropies from the whole table
of a group's 2^g corners with the 1e-8 inside both logarithms. ``LiteralQLIP`` wraps the same functions for the
benchmark: the computation the original does, in eager PyTorch, with nothing wasted on purpose.

Shapes: B images or texts, N patches, T text positions, D width, H heads, L bits a token, g bits a group, K = L / g.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]
State = Mapping[str, Tensor]

_TOWER: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "q_bias": True,
    "k_bias": True,
    "v_bias": True,
    "subln": False,
    "swiglu": False,
    "rope": False,
    "quantizer": "none",
    "quantizer_l2_norm": False,
    "quantizer_embed_type": "identity",
    "hidden_size_post_q": None,
    "quantizer_cfg": {},
}
_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "q_bias": True,
    "k_bias": True,
    "v_bias": True,
    "subln": False,
    "swiglu": False,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_QUANTIZER: Config = {
    "embed_dim": 18,
    "group_size": 9,
    "soft_entropy": True,
    "beta": 0.0,
    "gamma_0": 1.0,
    "gamma_1": 1.0,
    "input_format": "bchw",
    "persample_entropy_compute": "group",
    "l2_norm": True,
    "inv_temperature": 100.0,
}


def fill_defaults(config: Config) -> Config:
    """A config.json with the class defaults in every place it leaves open."""
    full = copy.deepcopy({"projection_dim": 512, "logit_scale_init_value": 2.6592, **config})
    full["text_config"] = {**_TEXT, **full.get("text_config", {})}
    for tower in ("vision_config", "decoder_config"):
        full[tower] = {**_TOWER, **full.get(tower, {})}
        if full[tower]["hidden_size_post_q"] is None:
            full[tower]["hidden_size_post_q"] = full[tower]["hidden_size"]
    full["vision_config"]["quantizer_cfg"] = {**_QUANTIZER, **full["vision_config"]["quantizer_cfg"]}
    return full


# --- layers -------------------------------------------------------------------------------------------------


def linear(p: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def layer_norm(p: State, name: str, x: Tensor, eps: float) -> Tensor:
    weight = p[f"{name}.weight"]
    return F.layer_norm(x, (weight.shape[0],), weight, p[f"{name}.bias"], eps)


def activation(name: str, x: Tensor) -> Tensor:
    if name == "gelu":
        return F.gelu(x)
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return F.gelu(x, approximate="tanh")
    return {"relu": F.relu, "silu": F.silu}[name](x)


def rope_tables(height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (height * width, head_dim), for a grid in row-major order."""
    dim = head_dim // 2
    frequencies = torch.tensor([10000 ** (-2 * i / dim) for i in range(dim // 2)])
    rows = torch.arange(height, dtype=torch.float32) / height * 16
    columns = torch.arange(width, dtype=torch.float32) / width * 16
    angles = []
    for y in range(height):
        for x in range(width):
            of_row = (rows[y] * frequencies).repeat_interleave(2)
            of_column = (columns[x] * frequencies).repeat_interleave(2)
            angles.append(torch.cat([of_row, of_column]))
    table = torch.stack(angles)
    return table.cos(), table.sin()


def rotate_pairs(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on adjacent lanes."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor], shift: int) -> Tensor:
    """Rotate x (B, S, H, hd) on positions [shift:]; the first ``shift`` positions pass untouched."""
    cos, sin = (table.to(x)[:, None, :] for table in tables)
    rest = x[:, shift:]
    rotated = rest * cos + rotate_pairs(rest) * sin
    return rotated if shift == 0 else torch.cat([x[:, :shift], rotated], dim=1)


def attention(
    p: State,
    name: str,
    x: Tensor,
    c: Config,
    mask: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    shift: int,
) -> Tensor:
    batch, length, width = x.shape
    heads = c["num_attention_heads"]
    head_dim = width // heads
    q = linear(p, f"{name}.q_proj", x) * head_dim**-0.5
    k = linear(p, f"{name}.k_proj", x)
    v = linear(p, f"{name}.v_proj", x)
    q, k, v = (t.reshape(batch, length, heads, head_dim) for t in (q, k, v))
    if tables is not None:
        q = apply_rope(q, tables, shift)
        k = apply_rope(k, tables, shift)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    context = torch.softmax(scores, dim=-1) @ v
    merged = context.transpose(1, 2).reshape(batch, length, width)
    if c["subln"]:
        merged = layer_norm(p, f"{name}.inner_attn_ln", merged, c["layer_norm_eps"])
    return linear(p, f"{name}.out_proj", merged)


def mlp(p: State, name: str, x: Tensor, c: Config) -> Tensor:
    if c["swiglu"]:
        hidden, last = F.silu(linear(p, f"{name}.w1", x)) * linear(p, f"{name}.w2", x), "w3"
    else:
        hidden, last = activation(c["hidden_act"], linear(p, f"{name}.fc1", x)), "fc2"
    if c["subln"]:
        hidden = layer_norm(p, f"{name}.ffn_ln", hidden, c["layer_norm_eps"])
    return linear(p, f"{name}.{last}", hidden)


def tower(
    p: State,
    name: str,
    x: Tensor,
    c: Config,
    mask: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    shift: int = 0,
) -> list[Tensor]:
    """Input of layer 0, then every layer's output."""
    states = [x]
    for i in range(c["num_hidden_layers"]):
        layer, eps = f"{name}.encoder.layers.{i}", c["layer_norm_eps"]
        h = layer_norm(p, f"{layer}.layer_norm1", x, eps)
        x = x + attention(p, f"{layer}.self_attn", h, c, mask, tables, shift)
        x = x + mlp(p, f"{layer}.mlp", layer_norm(p, f"{layer}.layer_norm2", x, eps), c)
        states.append(x)
    return states


# --- quantizer ----------------------------------------------------------------------------------------------


def binarize(z: Tensor, l2_norm: bool) -> Tensor:
    """The quantizer's output for z (B, N, L); its gradient is the identity times the output's own scale."""
    scale = z.shape[-1] ** -0.5 if l2_norm else 1.0
    code = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
    return (z + (code - z).detach()) * scale


def indices_of(z: Tensor, group_size: int) -> Tensor:
    """Group indices (B, N, L / group_size): a group's first channel is its most significant bit."""
    bits = (z > 0).long().reshape(*z.shape[:-1], -1, group_size)
    index = torch.zeros_like(bits[..., 0])
    for channel in range(group_size):
        index = index * 2 + bits[..., channel]
    return index


def corners(group_size: int, like: Tensor) -> Tensor:
    """Every code of a group, (2^g, g) of -1 and +1, in index order."""
    index = torch.arange(2**group_size, device=like.device)
    places = torch.arange(group_size - 1, -1, -1, device=like.device)
    return ((index[:, None] >> places & 1) * 2 - 1).to(like)


def entropy_terms(p: Tensor) -> Tensor:
    padded = p + 1e-8
    return -padded * padded.log()


def bsq_losses(z: Tensor, q: Config) -> dict[str, Tensor]:
    """Loss, per-sample entropy S, codebook entropy H and commitment of z (B, N, L), from the whole table of corners."""
    bits = z.shape[-1]
    scale = bits**-0.5 if q["l2_norm"] else 1.0
    group_size = 1 if q["persample_entropy_compute"] == "analytical" else q["group_size"]
    grouped = z.reshape(-1, bits // group_size, group_size)
    logits = 2 * q["inv_temperature"] * grouped @ (corners(group_size, z) * scale).T
    p = torch.softmax(logits, dim=-1)  # tokens, K, 2^g
    persample = entropy_terms(p).sum(dim=(-1, -2)).mean()
    codebook = entropy_terms(p.mean(dim=0)).sum()
    output = binarize(z, q["l2_norm"]).detach()
    commitment = ((output - z) ** 2).sum(dim=-1).mean()
    entropy_part = (q["gamma_0"] * persample - q["gamma_1"] * codebook) / q["inv_temperature"]
    return {
        "loss": q["beta"] * commitment + entropy_part,
        "S": persample,
        "H": codebook,
        "commitment": commitment,
    }


# --- the three towers ---------------------------------------------------------------------------------------


def bottleneck_in(p: State, patches: Tensor, c: Config) -> Tensor:
    z = patches
    if c["quantizer_embed_type"] == "mlp":
        name = "vision_model.quant_embed"
        z = linear(p, f"{name}.c_proj", F.gelu(linear(p, f"{name}.c_fc", z)))
    if c["quantizer_l2_norm"]:
        z = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return z


def bottleneck_out(p: State, codes: Tensor) -> Tensor:
    name = "vision_model.quant_embed_post"
    if f"{name}.c_fc.weight" not in p:  # the identity bottleneck has no projection on either side
        return codes
    return linear(p, f"{name}.c_proj", F.gelu(linear(p, f"{name}.c_fc", codes)))


Tables = tuple[Tensor, Tensor] | None


def tower_tables(c: Config, height: int, width: int) -> Tables:
    return rope_tables(height, width, c["hidden_size"] // c["num_attention_heads"]) if c["rope"] else None


def vision_states(p: State, pixels: Tensor, c: Config, tables: Tables) -> list[Tensor]:
    """Hidden states of the encoder, each (B, 1 + N, D)."""
    name = "vision_model.embeddings"
    weight, bias = p[f"{name}.patch_embedding.weight"], p[f"{name}.patch_embedding.bias"]
    patches = F.conv2d(pixels, weight, bias, stride=c["patch_size"]).flatten(2).transpose(1, 2)
    cls = p[f"{name}.class_embedding"].expand(pixels.shape[0], 1, -1)
    x = torch.cat([cls, patches], dim=1) + p[f"{name}.position_embedding.weight"]
    return tower(p, "vision_model", x, c, tables=tables, shift=1)


def decoder_states(p: State, post: Tensor, c: Config, tables: Tables) -> list[Tensor]:
    x = post + p["vision_decoder.position_embeddings"]
    return tower(p, "vision_decoder", x, c, tables=tables)


def decoder_pixels(p: State, x: Tensor, c: Config, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, 3, H, W), each patch laid out channel first."""
    (height, width), patch = grid, c["patch_size"]
    x = layer_norm(p, "vision_decoder.norm", x, c["layer_norm_eps"])
    x = linear(p, "vision_decoder.conv_out", torch.tanh(linear(p, "vision_decoder.ffn.0", x)))
    x = x.reshape(-1, height, width, 3, patch, patch)  # B, y, x, c, sh, sw
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, height * patch, width * patch)


def text_mask(length: int, attention_mask: Tensor | None, like: Tensor) -> Tensor:
    lowest = torch.finfo(like.dtype).min
    mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    above = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    mask = mask.masked_fill(above.to(like.device), lowest)[None, None]
    if attention_mask is not None:
        padding = torch.zeros(attention_mask.shape, dtype=like.dtype, device=like.device)
        mask = mask + padding.masked_fill(attention_mask == 0, lowest)[:, None, None, :]
    return mask


def text_states(p: State, ids: Tensor, attention_mask: Tensor | None, c: Config) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, last hidden state (B, T, D) and pooled (B, D)."""
    name = "text_model.embeddings"
    length = ids.shape[1]
    x = p[f"{name}.token_embedding.weight"][ids] + p[f"{name}.position_embedding.weight"][:length]
    states = tower(p, "text_model", x, c, mask=text_mask(length, attention_mask, x))
    last = layer_norm(p, "text_model.final_layer_norm", states[-1], c["layer_norm_eps"])
    positions = []
    for row in ids.tolist():
        if c["eos_token_id"] == 2:
            positions.append(row.index(max(row)))
        else:
            positions.append(row.index(c["eos_token_id"]) if c["eos_token_id"] in row else 0)
    pooled = torch.stack([last[i, position] for i, position in enumerate(positions)])
    return states, last, pooled


# --- the model ----------------------------------------------------------------------------------------------


def literal_forward(
    state_dict: State,
    config: Config,
    pixel_values: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """Every output the fixtures store, by its stored name; with ``train``, the ``train.*`` scalars too."""
    p, c = state_dict, fill_defaults(config)
    out: dict[str, Tensor] = {}
    if pixel_values is not None:
        out |= _image_outputs(p, c, pixel_values)
    if input_ids is not None:
        out |= _text_outputs(p, c, input_ids, attention_mask)
    if pixel_values is not None and input_ids is not None:
        logits = out["text_embeds"] @ out["image_embeds"].T * p["logit_scale"].exp()
        out["logits_per_text"], out["logits_per_image"] = logits, logits.T
        labels = torch.arange(logits.shape[0], device=logits.device)
        out["loss"] = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    if train:
        if pixel_values is None:
            raise ValueError("the training loss needs pixel_values")
        out["train.mse"] = F.mse_loss(out["reconstructions"], pixel_values)
        out["train.quantizer_loss"] = out["quantizer.loss"]
        out["train.total_loss"] = out["train.mse"] + out["quantizer.loss"]
        if "loss" in out:
            out["train.total_loss"] = out["train.total_loss"] + out["loss"]
    return out


def _image_outputs(p: State, c: Config, pixel_values: Tensor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    vision, decoder = c["vision_config"], c["decoder_config"]
    quantizer, patch = vision["quantizer_cfg"], vision["patch_size"]
    grid = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    states = vision_states(p, pixel_values, vision, tower_tables(vision, *grid))
    pooled = layer_norm(p, "vision_model.post_layernorm", states[-1][:, 0], vision["layer_norm_eps"])
    z = bottleneck_in(p, states[-1][:, 1:], vision)
    codes = binarize(z, quantizer["l2_norm"])
    post = bottleneck_out(p, codes)
    decoded = decoder_states(p, post, decoder, tower_tables(decoder, *grid))
    losses = bsq_losses(z, quantizer)
    out |= {f"vision.hidden_states.{i}": state for i, state in enumerate(states)}
    out |= {"vision.last_hidden_state": post, "vision.pooler_output": pooled}
    out |= {"quantizer.input": z, "quantizer.output": codes, "quantizer.loss": losses["loss"]}
    out |= {f"quantizer.{name}": losses[name] for name in ("S", "H", "commitment")}
    out["group_indices"] = indices_of(z, quantizer["group_size"])
    out["indices_exact"] = indices_of(z, z.shape[-1])[..., 0]
    out |= {f"decoder.hidden_states.{i}": state for i, state in enumerate(decoded)}
    out["reconstructions"] = decoder_pixels(p, decoded[-1], decoder, grid)
    out["image_features"] = linear(p, "visual_projection", pooled)
    out["image_embeds"] = out["image_features"] / out["image_features"].norm(dim=-1, keepdim=True)
    return out


def _text_outputs(p: State, c: Config, ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    states, last, pooled = text_states(p, ids, attention_mask, c["text_config"])
    features = linear(p, "text_projection", pooled)
    out = {f"text.hidden_states.{i}": state for i, state in enumerate(states)}
    out |= {"text.last_hidden_state": last, "text.pooler_output": pooled, "text_features": features}
    out["text_embeds"] = features / features.norm(dim=-1, keepdim=True)
    return out


class LiteralQLIP(nn.Module):
    """The literal forward with its weights as parameters, for timing beside the real model.

    Like the original it computes the entropies in eval as well. The RoPE tables are made once. The weights' storage is
    shared with ``state_dict``, their gradients are not.
    """

    def __init__(self, state_dict: State, config: Config) -> None:
        super().__init__()
        self.config = fill_defaults(config)
        self.names = [name for name in state_dict if not name.endswith(("rope.freqs_cos", "rope.freqs_sin"))]
        self.weights = nn.ParameterList(nn.Parameter(state_dict[name].detach()) for name in self.names)
        vision, decoder = self.config["vision_config"], self.config["decoder_config"]
        grid = vision["image_size"] // vision["patch_size"]
        self.grid = (grid, grid)
        self.vision_tables = tower_tables(vision, *self.grid)
        self.decoder_tables = tower_tables(decoder, *self.grid)

    def parameters_by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.weights, strict=True))

    def _encode(self, p: State, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The [CLS] state (B, D) and the quantizer's input (B, N, L)."""
        vision = self.config["vision_config"]
        last = vision_states(p, pixels, vision, self.vision_tables)[-1]
        return last[:, 0], bottleneck_in(p, last[:, 1:], vision)

    def _decode(self, p: State, codes: Tensor) -> Tensor:
        c = self.config["decoder_config"]
        last = decoder_states(p, bottleneck_out(p, codes), c, self.decoder_tables)[-1]
        return decoder_pixels(p, last, c, self.grid)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Group indices (B, N, K), with the entropies computed on the way, as the original does."""
        quantizer = self.config["vision_config"]["quantizer_cfg"]
        _, z = self._encode(self.parameters_by_name(), pixel_values)
        bsq_losses(z, quantizer)
        return indices_of(z, quantizer["group_size"])

    def decode(self, indices: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of group indices (B, N, K)."""
        p, quantizer = self.parameters_by_name(), self.config["vision_config"]["quantizer_cfg"]
        group_size = quantizer["group_size"]
        codes = corners(group_size, p["logit_scale"])[indices].flatten(-2)
        if quantizer["l2_norm"]:
            codes = codes / math.sqrt(codes.shape[-1])
        return self._decode(p, codes)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """``reconstructions``, ``quantizer_loss``, ``loss`` (contrastive) and ``indices``."""
        p, c = self.parameters_by_name(), self.config
        vision, quantizer = c["vision_config"], c["vision_config"]["quantizer_cfg"]
        cls, z = self._encode(p, pixel_values)
        pooled = layer_norm(p, "vision_model.post_layernorm", cls, vision["layer_norm_eps"])
        image = linear(p, "visual_projection", pooled)
        text = _text_outputs(p, c, input_ids, None)["text_embeds"]
        logits = text @ (image / image.norm(dim=-1, keepdim=True)).T * p["logit_scale"].exp()
        labels = torch.arange(logits.shape[0], device=logits.device)
        return {
            "reconstructions": self._decode(p, binarize(z, quantizer["l2_norm"])),
            "quantizer_loss": bsq_losses(z, quantizer)["loss"],
            "loss": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,
            "indices": indices_of(z, quantizer["group_size"]),
        }
