"""Gradients read back from a run's log, without the weights, and drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from qlip import QLIPError
from qlip.training.recipe import check_recipe
from qlip.training.studies.gradient_norms import plot, probing, read_gradients, write_gradients


@pytest.fixture
def run(tmp_path: Path, recipe_values: dict) -> Path:
    """The files of a run that looked at its gradients at every second line."""
    values = recipe_values | {"losses": {"alpha_r": 50, "alpha_a": 2, "alpha_q": 0.5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    lines = []
    for step in range(1, 7):
        line = {"step": step, "mse": 0.1, "gradient_norm": 3.0}
        if step % 2 == 0:
            norms = {"norm/mse": 50 * 0.01 / step, "norm/bsq": 0.5 * 0.3, "norm/align": 2 * 7.0}
            line |= norms | {"cosine/mse/bsq": 0.1, "cosine/mse/align": -0.5, "cosine/bsq/align": 0.0}
        lines.append(json.dumps(line))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_weights_are_divided_out(run: Path) -> None:
    lines = read_gradients(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["norm/mse"] == pytest.approx(0.01 / line["step"])
        assert (line["norm/bsq"], line["norm/align"]) == (pytest.approx(0.3), pytest.approx(7.0))
        assert line["cosine/mse/align"] == -0.5
        assert "gradient_norm" not in line and "mse" not in line


def test_factors_of_a_balance_are_divided_out(run: Path, recipe_values: dict) -> None:
    values = recipe_values | {"losses": {"alpha_r": 50, "alpha_a": 2, "balance": "gradient_norm"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "norm/mse": 30.0, "factor/mse": 3.0}) + "\n")
    assert read_gradients(run) == [{"step": 1, "norm/mse": pytest.approx(0.2)}]


def test_both_files_are_written_and_the_figure_shows_each_curve(run: Path) -> None:
    lines = read_gradients(run)
    numbers, image = write_gradients(lines, run / "figures", "a run")
    assert [json.loads(line) for line in numbers.read_text().splitlines()] == lines
    drawn = np.asarray(Image.open(image).convert("RGB")).reshape(-1, 3)
    assert len(drawn) > 500_000
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)):
        assert (drawn == colour).all(1).sum() > 50, colour


def test_one_loss_alone_is_drawn_too() -> None:
    data = plot([{"step": 1, "norm/align": 2.0}], "alone")
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_folders_without_gradients_are_refused(run: Path, recipe_values: dict) -> None:
    (run / "log.jsonl").write_text('{"step": 1, "mse": 0.1}\n')
    with pytest.raises(QLIPError, match="holds no gradients; train with log.gradients_every"):
        read_gradients(run)
    (run / "recipe.yaml").unlink()
    with pytest.raises(QLIPError, match="recipe.yaml: cannot be read"):
        read_gradients(run)
    second = check_recipe(recipe_values | {"stage": 2, "losses": {"alpha_g": 0}}, "it")
    with pytest.raises(QLIPError, match="stage 2's encoder is frozen"):
        probing(second, 5)


def test_probing_changes_the_log_alone(recipe_values: dict) -> None:
    recipe = check_recipe(recipe_values, "it")
    found = probing(recipe, 7)
    assert (found.log.every, found.log.gradients_every) == (7, 7)
    assert found.model_copy(update={"log": recipe.log}) == recipe
