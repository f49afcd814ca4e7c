"""The packaged recipes of UM3: the paper's numbers, and a twin that trains in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlip import recipes
from qlip.cli.main import run as qlip
from qlip.training import load_recipe
from qlip.um3.config import UM3Config

PAPER = {
    "model.group_size": 14,
    "model.rows": "shared",
    "model.softmax": "separate",
    "model.row_start": "mean",
    "model.qk_norm": True,
    "data.length": 4096,
    "data.mixture.text": (60.0, 12.0),
    "data.mixture.image_to_text": 1.0,
    "data.mixture.text_to_image": 3.0,
    "data.mixture.calm_down_steps": 10_000,
    "batch_size": 512,
    "schedule.steps": 600_000,
    "schedule.warmup": 2000,
    "schedule.floor": 0.0,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-4,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.1,
    "optimizer.clip": 1.0,
}
"""arXiv 2502.05178, section 4.3 and appendix."""


def value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def test_paper__its_numbers() -> None:
    recipe = load_recipe("um3/1.5b")
    assert {key: value(recipe, key) for key in PAPER} == PAPER


def test_paper__each_line_says_whose_it_is() -> None:
    text = (recipes.folder() / "um3/1.5b.yaml").read_text()
    settings = [line for line in text.splitlines() if line and not line.startswith(("#", "name", "task"))]
    settings = [line for line in settings if not line.endswith((":", ","))]
    assert settings and [line for line in settings if "# paper" not in line and "# ours" not in line] == []


@pytest.mark.parametrize("name", ["single-gpu", "nano", "nano-smollm2", "debug"])
def test_recipes__load(name: str) -> None:
    assert load_recipe(f"um3/{name}").task == "um3"


def test_debug__has_the_options_of_nano() -> None:
    nano, debug = load_recipe("um3/nano"), load_recipe("um3/debug")
    for key in ("model.rows", "model.row_start", "data.mixture.text", "losses.caption_weight", "optimizer", "ema"):
        assert value(nano, key) == value(debug, key), key


def test_debug__trains_by_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert qlip(["train", "um3/debug", "log.tensorboard=false", "-o", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "val/scenes seen/caption_per_word" in line]
    assert len(measured) == 2 and all(line["val/scenes seen/image_bits_shuffled"] > 0 for line in measured)
    assert sum("val/text bundled/text_bits_per_byte" in line for line in lines) == 2
    assert UM3Config.from_folder(folder / "model").rows == "per_group"
