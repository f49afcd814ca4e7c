"""Tiny drawers with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip import QLIPModel, QLIPProcessor
from qlip.lm import DecoderConfig, DecoderModel
from qlip.t2i import Drawer, DrawSettings


def tiny(condition: str = "tokens", **changes: object) -> DecoderModel:
    """A decoder of the bundled model's tokens that draws something else at every seed."""
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "rotary": "raster",
        "grid": (8, 8),
        "codebook_size": 128,
        "num_groups": 4,
        "head": {"kind": "chain"},
        "condition": condition,
        "condition_size": 4096 if condition == "tokens" else 3,
        "prefix_length": 24 if condition == "tokens" else 1,
        "code_fingerprint": QLIPModel.from_pretrained("bundled").code_fingerprint,
    }
    torch.manual_seed(0)
    model = DecoderModel(DecoderConfig.from_dict(values | changes)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="session")
def drawer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawer of captions, with guidance 2 at temperature 0.9."""
    folder = tmp_path_factory.mktemp("drawer") / "drawer"
    tiny().save_pretrained(folder)
    tokenizer = QLIPProcessor.from_pretrained("bundled").tokenizer
    assert tokenizer is not None
    tokenizer.save(folder)
    classes = {"cat": "a photo of a cat.", "ship": "a photo of a ship."}
    DrawSettings(guidance="2", temperature=0.9, classes=classes).save(folder)
    return folder


@pytest.fixture(scope="session")
def drawer(drawer_folder: Path) -> Drawer:
    return Drawer.from_pretrained(drawer_folder, device="cpu")
