"""`qlip recipe balance`, `probe` and `ablate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlip.training.recipe import load_recipe
from tests.cli.conftest import Command

CAPTIONS = ("a photo of a cat", "a photo of a dog", "a ship")


@pytest.fixture
def recipe(tmp_path: Path, model: Path, photos: Path) -> Path:
    """A run of a few steps from the small checkpoint, on three images with captions."""
    for path, caption in zip(sorted(photos.rglob("*.[pjw]*")), CAPTIONS, strict=True):
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))
    values = {
        "name": "small",
        "model": {"init": str(model)},
        "data": {"sources": [{"path": str(photos)}], "num_workers": 0},
        "batch_size": 3,
        "losses": {"alpha_r": 10},
        "schedule": {"steps": 4},
        "log": {"every": 1, "images_every": 0, "tensorboard": False},
        "threads": 1,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_balance__writes_a_recipe_to_train(qlip: Command, recipe: Path) -> None:
    ran = qlip("recipe", "balance", recipe, "seed=5", "-o", "b", "--steps", "16", "--json")
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
    again = qlip("recipe", "balance", recipe, "seed=5", "-o", "b", "--steps", "16")
    assert again.code == 0 and again.err.count("finished already, not trained again") == 2
    assert "qlip train b/recipe.yaml -o b/balanced" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in Path("b").glob("*/log.jsonl")}
    other = qlip("recipe", "balance", recipe, "seed=6", "-o", "b", "--steps", "16")
    assert other.code == 1 and "holds a model of another recipe: seed (5, now 6)" in other.err


def test_quiet__training_prints_nothing_on_stderr(qlip: Command, recipe: Path) -> None:
    for command in (["train"], ["recipe", "probe", "--every", 2], ["recipe", "balance", "--steps", 16]):
        ran = qlip("-q", *command, recipe, "-o", command[1] if len(command) > 1 else "run")
        warnings = [line for line in ran.error_lines if "the loss is still falling" in line]
        assert ran.code == 0 and ran.error_lines == warnings and ran.out


def test_balance__wrong_usage(qlip: Command) -> None:
    ran = qlip("recipe", "balance", "ablation/stage2")
    assert ran.code == 2 and "this is stage 2" in ran.err


def test_ablate__writes_its_table_and_continues(
    qlip: Command, recipe: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    values = {
        "title": "rate",
        "recipe": str(recipe),
        "seeds": [0],
        "variants": {"low": {"overrides": {"optimizer.lr": 1e-5}}, "high": {"init_from": "low"}},
        "measure": [{"data": str(photos), "evaluator": "reconstruction", "settings": {"lpips": ["vgg"]}}],
    }
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    early = qlip("recipe", "ablate", study, "-o", "s", "--table-only", "--json")
    assert early.code == 0 and [row["seeds"] for row in early.json["rows"]] == [[], []]
    assert not Path("s/low").exists()
    one = qlip("recipe", "ablate", study, "-o", "s", "--only", "low", "--json")
    assert one.code == 0 and [row["seeds"] for row in one.json["rows"]] == [[0], []]
    assert "get them with qlip data get lpips" in one.err
    both = qlip("recipe", "ablate", study, "-o", "s")
    assert both.code == 0 and "training low" not in both.err and "training high, seed 0" in both.err
    assert "measuring low" not in both.err
    assert Path("s/table.md").read_text().splitlines()[0].startswith("| rate | seeds |")
    assert json.loads(Path("s/table.json").read_text())["rows"][1]["seeds"] == [0]
    wrong = qlip("recipe", "ablate", study, "-o", "s", "--only", "hihg")
    assert wrong.code == 2 and "did you mean 'high'" in wrong.err


def test_probe__trains_a_recipe_or_reads_a_run(qlip: Command, recipe: Path) -> None:
    ran = qlip("recipe", "probe", recipe, "-o", "g", "--every", "2", "--json")
    assert ran.code == 0
    lines = [json.loads(line) for line in Path("g/gradients.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and ran.json["last"] == lines[-1]
    for line in lines:
        assert all(line[f"norm/{loss}"] > 0 for loss in ("mse", "bsq", "align"))
        assert all(-1 <= line[f"cosine/{pair}"] <= 1 for pair in ("mse/bsq", "mse/align", "bsq/align"))
    logged = json.loads(Path("g/log.jsonl").read_text().splitlines()[-1])
    assert lines[-1]["norm/mse"] == pytest.approx(logged["norm/mse"] / 10)  # alpha_r
    assert Path("g/gradients.png").stat().st_size > 10_000
    again = qlip("recipe", "probe", "g", "-o", "elsewhere")
    assert again.code == 0 and "elsewhere/gradients.png" in again.out
    assert Path("elsewhere/gradients.jsonl").read_bytes() == Path("g/gradients.jsonl").read_bytes()
    assert qlip("recipe", "probe", "g", "seed=1").code == 2


def test_probe__run_shorter_than_the_interval_is_measured(qlip: Command, recipe: Path) -> None:
    ran = qlip("recipe", "probe", recipe, "-o", "g", "--json")
    assert ran.code == 0 and "has 4 steps, fewer than --every 10; measuring every 1\n" in ran.err
    lines = [json.loads(line) for line in Path("g/gradients.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
