"""A small recipe of UM3 on made scenes and a file of text, and runs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlip.training import run
from qlip.training.recipe import check_recipe

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of English."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        f"The {n}th letter says that the {'war' if n % 3 else 'sea'} was long, and that {n} ships came home."
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def values(text_file: Path) -> dict[str, Any]:
    """Micro-batches, EMA, z-loss, the three kinds of rows, and a calm-down, from random weights."""
    return {
        "name": "um3",
        "task": "um3",
        "model": {"config": SIZES, "vocabulary": 320, "rows": "per_group", "row_start": "random"},
        "data": {
            "length": 300,
            "text": [{"path": str(text_file)}],
            "images": [{"scenes": "captioned"}],
            "mixture": {"text": [4, 1], "image_to_text": 1, "text_to_image": 1, "calm_down_steps": 4},
            "text_dropout": 0.3,
        },
        "losses": {"visual_weight": 0.5, "caption_weight": 3.0, "z_loss": 1e-4},
        "batch_size": 4,
        "micro_batch_size": 2,
        "optimizer": {"name": "muon", "lr": 1e-2, "muon_lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"steps": 4, "warmup": 1},
        "ema": {"decay": 0.9},
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 10},
        "log": {"every": 1, "tensorboard": False},
    }


def train(values: dict[str, Any], folder: Path) -> Path:
    """Run a recipe; returns the folder of the model."""
    return run(check_recipe(values, "test"), folder, Console(quiet=True)).model
