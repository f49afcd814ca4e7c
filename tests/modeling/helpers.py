"""Stored fixtures, small configurations and comparisons for the modeling tests."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qlip import QLIPError

FIXTURES = Path(__file__).parent.parent / "fixtures"
FIXTURE = FIXTURES / "a28_swiglu_subln_rope_28bit"
PUBLISHED = ["QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392"]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
MODEL_FIXTURES = sorted(folder.parent.name for folder in FIXTURES.glob("*/model.safetensors"))


@dataclass(frozen=True)
class StoredModel:
    """One fixture folder: a checkpoint and what the reference made of it."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    @property
    def quantizer(self) -> dict[str, Any]:
        quantizer: dict[str, Any] = self.config["vision_config"]["quantizer_cfg"]
        return quantizer


@cache
def load_fixture(name: str) -> StoredModel:
    folder = FIXTURES / name
    return StoredModel(
        folder,
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
        load_file(folder / "grads.safetensors"),
    )


def assert_close(name: str, actual: Tensor, expected: Tensor, *, extra: float = 0.0) -> None:
    """Within atol 2e-5 + 2e-5 max|expected|, plus what the caller allows on top."""
    _assert_within(name, actual, expected, 2e-5 + 2e-5 * _peak(expected) + extra)


def assert_grad_close(name: str, actual: Tensor | None, expected: Tensor, *, extra: float = 0.0) -> None:
    """Within 1e-6 + 1e-4 max|expected|, plus what the caller allows on top."""
    assert actual is not None, f"{name} has no gradient"
    _assert_within(name, actual, expected, 1e-6 + 1e-4 * _peak(expected) + extra)


def _peak(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _assert_within(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    worst = _peak(actual.double() - expected.double())
    assert worst <= tolerance, f"{name}: off by {worst:.3g}, allowed {tolerance:.3g}"


def persample_allowance(group_size: int, num_groups: int) -> float:
    """How far S may lie from the reference's: that adds 1e-8 inside its logarithm, this model does not."""
    return float(1.9e-7 * 2**group_size * num_groups)


def small_config(**changes: Any) -> dict[str, Any]:
    """A config.json of a QLIP with a thousandth of the size, as the published ones are written.

    Args:
        changes: values by dotted name with ``__`` for the dot, e.g. ``vision_config__swiglu=False``. What is given
            for ``grid__NAME`` goes into encoder and decoder, for ``towers__NAME`` into the text tower too.
    """
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "k_bias": False,
        "layer_norm_eps": 1e-6,
        "rope": True,
        "subln": True,
        "swiglu": True,
    }
    quantizer = {
        "quantizer": "bsq",
        "quantizer_cfg": {"embed_dim": 12, "group_size": 4, "input_format": "blc", "l2_norm": True},
        "quantizer_embed_type": "mlp",
        "quantizer_l2_norm": True,
    }
    config: dict[str, Any] = {
        "projection_dim": 16,
        "vision_projection_bias": True,
        "text_projection_bias": False,
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 10,
            "vocab_size": 50,
            "bos_token_id": 48,
            "eos_token_id": 49,
        },
        "vision_config": {**tower, **quantizer},
        "decoder_config": dict(tower),
    }
    places = {
        "grid": ("vision_config", "decoder_config"),
        "towers": ("text_config", "vision_config", "decoder_config"),
    }
    config = copy.deepcopy(config)
    for name, value in changes.items():
        first, *rest = name.split("__")
        for start in places.get(first, (first,)):
            *parents, last = [start, *rest]
            target = config
            for parent in parents:
                target = target[parent]
            target[last] = value
    return config


def photo(width: int = 48, height: int = 40) -> Image.Image:
    """A smooth image with a different colour in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 128 + 0 * x], axis=-1)
    return Image.fromarray(array.astype(np.uint8))


def as_array(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def rewrite_config(folder: Path, change: Any) -> None:
    """Change the ``config.json`` of a checkpoint."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def assert_one_line(error: pytest.ExceptionInfo[QLIPError], *wanted: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in wanted:
        assert text in message
