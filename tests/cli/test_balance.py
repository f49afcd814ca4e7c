"""`qlip balance`, `qlip probe` and `qlip ablate`, from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlip.training.recipe import load_recipe
from tests.cli.conftest import Command

WORDS = ("a photo of a cat", "a photo of a dog", "a ship")


@pytest.fixture
def recipe(tmp_path: Path, model: Path, photos: Path) -> Path:
    """A run of a few steps from the small checkpoint, on three pictures with words."""
    for path, words in zip(sorted(photos.rglob("*.[pjw]*")), WORDS, strict=True):
        path.with_suffix(".json").write_text(json.dumps({"caption": words}))
    values = {
        "name": "small",
        "model": {"init": str(model)},
        "data": {"sources": [{"path": str(photos)}], "num_workers": 0},
        "batch_size": 3,
        "losses": {"alpha_r": 10},
        "schedule": {"steps": 4},
        "log": {"every": 1, "pictures_every": 0, "tensorboard": False},
        "threads": 1,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_balance_writes_a_recipe_to_train(qlip: Command, recipe: Path) -> None:
    ran = qlip("balance", recipe, "seed=5", "-o", "b", "--steps", "16", "--json")
    assert ran.code == 0
    alignment, reconstruction = ran.json["losses"]
    assert (alignment["objective"], reconstruction["objective"]) == ("alignment", "reconstruction")
    ratio = alignment["excess"] / reconstruction["excess"]
    assert ran.json["ratio"] == pytest.approx(ratio)
    assert ran.json["alpha_r"] == pytest.approx(ratio, rel=0.05)
    written = load_recipe("b/recipe.yaml")
    assert (written.losses.alpha_r, written.losses.alpha_a, written.seed) == (ran.json["alpha_r"], 1, 5)
    assert written.schedule.steps == 4  # the recipe's own, not the short runs'
    assert "mse" not in json.loads(Path("b/alignment/log.jsonl").read_text().splitlines()[-1])
    before = {path: path.stat().st_mtime_ns for path in Path("b").glob("*/log.jsonl")}
    again = qlip("balance", recipe, "seed=5", "-o", "b", "--steps", "16")
    assert again.code == 0 and again.err.count("finished before, not trained again") == 2
    assert "qlip train b/recipe.yaml -o b/balanced" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in Path("b").glob("*/log.jsonl")}
    other = qlip("balance", recipe, "seed=6", "-o", "b", "--steps", "16")
    assert other.code == 1 and "holds a model of another recipe, seed 5 where 6 is wanted" in other.err


def test_balance_typed_wrong(qlip: Command) -> None:
    ran = qlip("balance", "ablation/stage2")
    assert ran.code == 2 and "this is stage 2" in ran.err
