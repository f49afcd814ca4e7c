"""Blocks with a stock model's weights: they give its numbers, so Llama's and Qwen3's weights run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from qlip.lm.cache import KVCache
from qlip.lm.config import DecoderConfig
from qlip.lm.export import block_of_stock_layer, stock_layer
from qlip.lm.rotary import rotary_table
from qlip.lm.transformer import DecoderBlock, RMSNorm, causal_mask

FOLDER = Path(__file__).parents[1] / "fixtures" / "decoder"
TOLERANCE = 1e-5


class Stock:
    """A fixture, with its layers as our blocks."""

    def __init__(self, name: str) -> None:
        values = json.loads((FOLDER / name / "config.json").read_text())
        self.weights, self.inputs, self.outputs, self.grads = (
            load_file(FOLDER / name / f"{kind}.safetensors") for kind in ("model", "inputs", "outputs", "grads")
        )
        self.config = DecoderConfig.from_dict(
            {
                "hidden_size": values["hidden_size"],
                "num_hidden_layers": values["num_hidden_layers"],
                "num_attention_heads": values["num_attention_heads"],
                "num_key_value_heads": values["num_key_value_heads"],
                "head_dim": values["head_dim"],
                "intermediate_size": values["intermediate_size"],
                "rms_norm_eps": values["rms_norm_eps"],
                "qk_norm": values["model_type"] == "qwen3",
                "rotary": "1d",
                "rotary_base": values["rope_parameters"]["rope_theta"],
                "grid": (8, 8),
                "codebook_size": values["vocab_size"],
                "condition_size": 1,
            }
        )
        config = self.config
        self.blocks = []
        for number in range(config.num_hidden_layers):
            block = DecoderBlock(
                config.hidden_size,
                config.ffn_width,
                config.num_attention_heads,
                config.kv_heads,
                config.head_width,
                config.rms_norm_eps,
                config.qk_norm,
            )
            block.load_state_dict(block_of_stock_layer(self.layer(self.weights, number), config.head_width))
            self.blocks.append(block)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.load_state_dict({"weight": self.weights["model.norm.weight"]})
        self.table = rotary_table(config)

    @staticmethod
    def layer(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{number}."
        return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

    def run(self, ids: Tensor, table: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> list[Tensor]:
        """Hidden states after the embedding and each block, the last after the norm; and the logits."""
        found = [self.weights["model.embed_tokens.weight"][ids]]
        for number, block in enumerate(self.blocks):
            found.append(block(found[-1], table, mask, cache, number))
        found[-1] = self.norm(found[-1])
        return [*found, found[-1] @ self.weights["lm_head.weight"].T]


@pytest.fixture(params=["llama_untied", "qwen3_untied"])
def stock(request: pytest.FixtureRequest) -> Stock:
    return Stock(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_blocks__have_a_stock_models_states_and_gradients(stock: Stock) -> None:
    ids, labels = stock.inputs["input_ids"], stock.inputs["labels"]
    *states, logits = stock.run(ids, stock.table[: ids.shape[1]])
    for number, state in enumerate(states):
        close(state, stock.outputs[f"hidden_states.{number}"])
    close(logits, stock.outputs["logits"])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(loss, stock.outputs["loss"])
    loss.backward()
    for number, block in enumerate(stock.blocks):
        gradients = {name: one.grad for name, one in block.named_parameters() if one.grad is not None}
        found = stock_layer(gradients, block.attention.sizes, stock.config.head_width)
        expected = stock.layer(stock.grads, number)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient)


@torch.no_grad()
def test_blocks__left_padding_is_a_start(stock: Stock) -> None:
    real = stock.inputs["padded_attention_mask"].bool()
    ids, count = stock.inputs["padded_input_ids"], real.shape[1]
    mask = causal_mask(count, 0, real.long().argmax(1), torch.float32, ids.device)
    logits = stock.run(ids, stock.table[stock.inputs["padded_position_ids"].clamp(min=0)], mask)[-1]
    close(logits * real[..., None], stock.outputs["padded_logits"] * real[..., None])
    by_place = stock.run(ids, stock.table[:count], mask)[-1]  # only distances count
    close(by_place * real[..., None], stock.outputs["padded_logits"] * real[..., None])


@torch.no_grad()
def test_blocks__packed_documents_do_not_see_each_other(stock: Stock) -> None:
    ids, lengths = stock.inputs["input_ids"][:1], stock.inputs["packed_lengths"]
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    seen = (document[:, None] == document) & torch.ones(20, 20).tril().bool()
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~seen, float("-inf"))
    logits = stock.run(ids, stock.table[stock.inputs["packed_position_ids"][0]], mask)[-1]
    close(logits, stock.outputs["packed_logits"])


@torch.no_grad()
@pytest.mark.parametrize(("tag", "prompt"), [("greedy", 8), ("padded_greedy", 12)])
def test_blocks__cached_greedy_tokens_are_a_stock_models(stock: Stock, tag: str, prompt: int) -> None:
    padded = tag.startswith("padded")
    ids = stock.inputs["padded_input_ids" if padded else "input_ids"][:, :prompt]
    cache = KVCache(stock.config, len(ids))
    if padded:
        cache.start = stock.inputs["padded_attention_mask"].long().argmax(1)
    expected: Any = stock.outputs[tag]
    while ids.shape[1] < expected.shape[1]:
        new = ids[:, cache.length :]
        mask = causal_mask(new.shape[1], cache.length, cache.start, torch.float32, ids.device)
        table = stock.table[cache.length : ids.shape[1]]
        logits = stock.run(new, table, mask, cache)[-1]
        cache.advance(new.shape[1])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected)


def test_stock_layer__and_back_is_exact(stock: Stock) -> None:
    for number, block in enumerate(stock.blocks):
        found = stock_layer(block.state_dict(), block.attention.sizes, stock.config.head_width)
        expected = stock.layer(stock.weights, number)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], one) for name, one in expected.items())
