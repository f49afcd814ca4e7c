"""Tiny vision-language models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.modeling.model import QLIPModel
from qlip.vlm.config import VLMConfig
from qlip.vlm.model import VisionLanguageModel, load_tower

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
"""Sizes of a tiny text decoder, without its vocabulary."""


def tiny(vocab_size: int = 300, pool: int = 2, layer: int | str = -2, **changes: Any) -> VisionLanguageModel:
    """A model of the bundled tower, 16 tokens per image, whose outputs differ at every position."""
    qlip = QLIPModel.from_pretrained("bundled")
    text = CausalConfig.from_dict(TEXT | {"vocab_size": vocab_size})
    values = {
        "model_type": "qlip_vlm",
        "vision_fingerprint": qlip.code_fingerprint,
        "vision_config": qlip.config.vision_config.to_dict(),
        "layer": layer,
        "pool": pool,
        "template": "qa",
        "text_config": text.to_dict(),
    }
    torch.manual_seed(0)
    model = VisionLanguageModel.from_parts(
        VLMConfig.from_dict(values | changes), load_tower("bundled"), CausalModel(text)
    )
    for part in (model.projector, model.llm):
        for weight in part.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def vlm() -> VisionLanguageModel:
    """A tiny model; tests leave it as it is."""
    return tiny()


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, vlm: VisionLanguageModel) -> Path:
    """Its folder, without a tokenizer."""
    folder = tmp_path_factory.mktemp("vlm") / "vlm"
    vlm.save_pretrained(folder)
    return folder
