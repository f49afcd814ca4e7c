"""Benchmark cases: published shapes, their inputs, and the two models with equal weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip import QLIPConfig, QLIPModel
from tests.literal import LiteralQLIP, fill_defaults

Operation = Literal["encode", "decode", "forward", "train"]
Contender = Literal["literal", "qlip", "qlip, checkpointed"]
OPERATIONS: tuple[Operation, ...] = ("encode", "decode", "forward", "train")

SHAPES = {"B-16": ("QLIP-B-16-256", 8), "B-8": ("QLIP-B-8-256", 2)}
"""Published config and batch size by name."""


def contenders(operation: Operation) -> tuple[Contender, ...]:
    """List the implementations to time; activation checkpointing matters only in training."""
    both: tuple[Contender, ...] = ("literal", "qlip")
    return (*both, "qlip, checkpointed") if operation == "train" else both


@dataclass(frozen=True)
class Case:
    """A shape with a group size.

    Attributes:
        shape: key of ``SHAPES``.
        group_size: bits per group (G); determines the cost of the entropy terms.
        tiny: shrink the model, to test the benchmark itself.
    """

    shape: str
    group_size: int
    tiny: bool = False

    @property
    def batch(self) -> int:
        """Batch size in images."""
        return SHAPES[self.shape][1]

    def config(self) -> dict[str, Any]:
        """Return the published config.json with this group size."""
        config = copy.deepcopy(QLIPConfig.named(SHAPES[self.shape][0]).to_json_dict())
        config["vision_config"]["quantizer_cfg"]["group_size"] = self.group_size
        if self.tiny:
            small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            for tower in ("text_config", "vision_config", "decoder_config"):
                config[tower].update(small)
            for tower in ("vision_config", "decoder_config"):
                config[tower]["image_size"] = 4 * config[tower]["patch_size"]
        return config

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Make normalised pixels and full-length texts."""
        config, generator = fill_defaults(self.config()), torch.Generator().manual_seed(0)
        size, text = config["vision_config"]["image_size"], config["text_config"]
        pixels = torch.randn(self.batch, 3, size, size, generator=generator)
        ids = torch.randint(
            1000, text["eos_token_id"], (self.batch, text["max_position_embeddings"]), generator=generator
        )
        ids[:, -1] = text["eos_token_id"]
        return pixels, ids

    def models(self) -> tuple[LiteralQLIP, QLIPModel]:
        """Make both models with equal random weights."""
        config = self.config()
        torch.manual_seed(0)
        model = QLIPModel(QLIPConfig.from_dict(config))
        return LiteralQLIP(model.state_dict(), config), model


def work(case: Case, operation: Operation, contender: Contender) -> Callable[[], None]:
    """Prepare one operation of one implementation as a function to call."""
    literal, model = case.models()
    return work_of(case, operation, contender, literal, model)


def work_of(
    case: Case, operation: Operation, contender: Contender, literal: LiteralQLIP, model: QLIPModel
) -> Callable[[], None]:
    """Prepare an operation like :func:`work`, with given models."""
    chosen: LiteralQLIP | QLIPModel = literal if contender == "literal" else model
    pixels, ids = case.inputs()

    @torch.no_grad()
    def infer() -> None:
        chosen.eval()
        if operation == "encode":
            chosen.encode(pixels)
        elif operation == "decode":
            chosen.decode(indices)
        elif contender == "literal":
            literal(pixels, ids)
        else:
            model(pixels, ids, return_loss=True)

    def train() -> None:
        chosen.train()
        if contender == "literal":
            output = literal(pixels, ids)
            reconstructions, others = output["reconstructions"], output["loss"] + output["quantizer_loss"]
        else:
            model.set_activation_checkpointing(contender == "qlip, checkpointed")
            result = model(pixels, ids, return_loss=True)
            reconstructions, others = result.reconstructions, result.loss + result.quantizer_loss
        (F.mse_loss(reconstructions, pixels) + others).backward()
        chosen.zero_grad(set_to_none=True)

    if operation == "decode":
        tokens, groups = model.grid[0] * model.grid[1], model.num_groups
        indices = torch.randint(0, 2**case.group_size, (case.batch, tokens, groups))
    return train if operation == "train" else infer


def transformer_encoder(case: Case) -> nn.TransformerEncoder:
    """Make PyTorch's transformer stack of the encoder's size; the MLP's width gives as many products as SwiGLU."""
    vision = fill_defaults(case.config())["vision_config"]
    width = vision["hidden_size"]
    layer = nn.TransformerEncoderLayer(
        width,
        vision["num_attention_heads"],
        dim_feedforward=vision["intermediate_size"] * 3 // 2,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerEncoder(layer, vision["num_hidden_layers"], enable_nested_tensor=False)


def operations_of(case: Case, operation: Operation) -> float:
    """Count the operations of all matrix products in one call, 2 per multiply-add; a backward pass counts twice."""
    config = fill_defaults(case.config())
    vision, decoder, text = (config[f"{name}_config"] for name in ("vision", "decoder", "text"))
    grid = vision["image_size"] // vision["patch_size"]
    tokens, patch, bits = grid**2, vision["patch_size"], vision["quantizer_cfg"]["embed_dim"]
    width, post, inner = vision["hidden_size"], decoder["hidden_size"], decoder["intermediate_size"]
    down = tokens * (width * width + width * bits)
    up = tokens * (bits * post + post * post)
    head = tokens * (post * inner + inner * 3 * patch**2)
    encode = tokens * width * 3 * patch**2 + _stack(vision, tokens + 1) + down
    decode = up + _stack(decoder, tokens) + head
    whole = encode + decode + _stack(text, text["max_position_embeddings"])
    products = {"encode": encode, "decode": decode, "forward": whole, "train": 3 * whole}[operation]
    return float(2 * case.batch * products)


def _stack(tower: dict[str, Any], tokens: int) -> int:
    """Count the multiply-adds of a transformer stack on one sequence."""
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    mlp = (3 if tower["swiglu"] else 2) * width * inner
    attention = 4 * width**2 + 2 * tokens * width
    return int(tower["num_hidden_layers"] * tokens * (mlp + attention))
