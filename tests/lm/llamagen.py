"""LlamaGen's fixtures: tiny models as numbers, and our models with their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.lm.model import DecoderModel

FOLDER = Path(__file__).parents[1] / "fixtures" / "llamagen"
MODELS = ("c2i", "t2i", "t2i_headdim20_multiple32", "c2i_gqa")
CACHED = MODELS[:3]
"""The reference's cache fails with fewer key-value heads."""


class Fixture:
    """One model's folder."""

    def __init__(self, name: str) -> None:
        folder = FOLDER / name
        self.values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.text = self.values["model_type"] == "t2i"

    @property
    def config(self) -> DecoderConfig:
        values = self.values
        side = round(values["block_size"] ** 0.5)
        return DecoderConfig(
            hidden_size=values["dim"],
            num_hidden_layers=values["n_layer"],
            num_attention_heads=values["n_head"],
            num_key_value_heads=values["n_kv_head"],
            intermediate_size=values["ffn_hidden"],
            rotary="axial",
            prefix_rotary="zero",
            grid=(side, side),
            codebook_size=values["vocab_size"],
            head={"kind": "flat"},
            condition="features" if self.text else "class",
            condition_size=values["caption_dim"] if self.text else values["num_classes"],
            prefix_length=values["cls_token_num"],
        )

    @property
    def model(self) -> DecoderModel:
        model = DecoderModel(self.config)
        model.load_state_dict({self.names.get(name, name): one for name, one in self.weights.items()})
        return model.eval()

    names = {
        "output.weight": "head.output.weight",
        "cls_embedding.embedding_table.weight": "condition.embedding.weight",
        "cls_embedding.cap_proj.fc1.weight": "condition.fc1.weight",
        "cls_embedding.cap_proj.fc2.weight": "condition.fc2.weight",
        "cls_embedding.uncond_embedding": "condition.uncond_embedding",
    }

    @property
    def condition(self) -> Condition:
        if self.text:
            return Condition(self.inputs["features"], self.inputs["emb_mask"])
        return Condition(self.inputs["labels"])

    @property
    def indices(self) -> Tensor:
        return self.inputs["idx"][..., None]
