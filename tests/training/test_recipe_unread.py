"""Keys of a recipe that nothing would read, and values that pydantic would take for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from qlip import QLIPError
from qlip.training import load_recipe, run
from qlip.training.recipe import check_recipe

STAGE_2 = {"task": "stage2", "losses": {"alpha_g": 0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": {"size": 600}}, "vocabulary is used only with model.config"),
        ({"accumulation": "mean"}, "accumulation is used only with micro_batch_size"),
        ({"losses": {"alpha_r": 0, "alpha_q": 0, "alpha_a": 0}}, "every weight is 0, so nothing would be trained"),
        (
            STAGE_2 | {"optimizer": {"parts": {"encoder": 1e-4}}},
            "optimizer.parts.encoder is used only with task: stage1",
        ),
        (STAGE_2 | {"validation": {"every": 1, "sets": ["x"], "templates": "imagenet"}}, "templates is used only with"),
        ({"task": "stage2", "losses": {"alpha_r": 0, "alpha_q": 0, "alpha_p": 0, "alpha_g": 0}}, "every weight is 0"),
    ],
)
def test_recipe__refuses_a_key_that_nothing_reads(
    recipe_values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(QLIPError, match=message) as raised:
        check_recipe(recipe_values | changes, "test")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["batch_size", "optimizer.lr", "data.num_workers", "data.sources.0.flip", "skip_limit"])
def test_recipe__true_is_not_a_number(recipe_file: Path, key: str) -> None:
    with pytest.raises(QLIPError, match=rf"{key}: must be a number, got true or false"):
        load_recipe(str(recipe_file), [f"{key}=true"])


def test_run__from_random_weights_without_captions(
    recipe_values: dict[str, Any], shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reconstruction alone needs no vocabulary but that of single bytes; the warm-up is longer than the run."""
    recipe_values["model"] = {"config": "debug-B-16"}
    recipe_values["data"]["sources"][0]["captions"] = False
    recipe_values["schedule"] = {"steps": 2, "warmup": 8}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values | {"losses": {"alpha_a": 0}}))
    assert run(load_recipe(str(path)), tmp_path / "run").finished
    assert "warmup 8 is longer than the run: learning rates end at 25% of their peaks" in capsys.readouterr().err
    with pytest.raises(QLIPError, match="no source has captions"):
        run(load_recipe(str(path), ["losses.alpha_a=1"]), tmp_path / "aligned", Console(quiet=True))


def test_recipe__notes_a_discriminator_that_starts_after_the_run(recipe_values: dict[str, Any]) -> None:
    late = {
        "task": "stage2",
        "losses": {"alpha_g": 0.1},
        "discriminator": {"start": recipe_values["schedule"]["steps"]},
    }
    notes = check_recipe(recipe_values | late, "test").notes
    assert len(notes) == 1 and "the discriminator never trains" in notes[0]


@pytest.mark.parametrize(
    ("name", "weight", "keys"),
    [
        ("nano/stage1", "losses.alpha_a", "losses.align"),
        ("QLIP-B-16-256/stage1", "losses.alpha_a", "optimizer.parts.text, losses.align"),
        ("QLIP-B-16-256/stage1", "losses.alpha_r", "optimizer.parts.decoder"),
        ("QLIP-B-16-256/stage2", "losses.alpha_g", "discriminator"),
    ],
)
def test_recipe__one_weight_can_be_0_and_a_note_names_what_then_has_no_effect(
    name: str, weight: str, keys: str
) -> None:
    overrides = [f"{weight}=0"] + ["losses.align.share_targets=false"] * (name == "nano/stage1")
    assert load_recipe(name, overrides).notes == [f"{weight} is 0: no effect of {keys}"]
