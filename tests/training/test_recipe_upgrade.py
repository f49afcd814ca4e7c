from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from qlip import QLIPError
from qlip.training import load_recipe, run
from qlip.training.recipe import check_recipe
from qlip.training.recipe_upgrade import upgrade
from qlip.training.run_folder import stored_recipe


def old(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe as version 0.1 had it."""
    log = {"every": 3, "pictures_every": 2, "pictures": 5, "tensorboard": False}
    return values | {"stage": 1, "log": log, "data": values["data"] | {"broken_limit": 7}}


def test_upgrade__old_keys_have_their_new_names_and_a_note_each(recipe_values: dict[str, Any]) -> None:
    values, notes = upgrade(old(recipe_values), "old.yaml")
    assert values["task"] == "stage1" and values["skip_limit"] == 7 and values["log"]["images"] == 5
    assert "stage" not in values and "broken_limit" not in values["data"] and "pictures" not in values["log"]
    assert len(notes) == 4 and all(note.startswith("old.yaml: ") for note in notes)
    again, none = upgrade(values, "new.yaml")
    assert again == values and none == []


def test_upgrade__a_recipe_of_no_stage_is_stage_1s(recipe_values: dict[str, Any]) -> None:
    assert check_recipe(recipe_values, "it").task == "stage1"


def test_upgrade__refuses_both_names_and_other_stages(recipe_values: dict[str, Any]) -> None:
    with pytest.raises(QLIPError, match="data.broken_limit is the old name of skip_limit"):
        upgrade(old(recipe_values) | {"skip_limit": 3}, "it")
    with pytest.raises(QLIPError, match="stage must be 1 or 2, got 3"):
        upgrade(recipe_values | {"stage": 3}, "it")


def test_load_recipe__old_overrides_reach_new_keys(recipe_file: Path) -> None:
    notes: list[str] = []
    recipe: Any = load_recipe(str(recipe_file), ["log.pictures_every=4", "data.broken_limit=1"], notes.append)
    assert recipe.log.images_every == 4 and recipe.skip_limit == 1


def test_run__an_old_runs_folder_is_resumed(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old(recipe_values)))
    recipe = load_recipe(str(path), ["schedule.steps=2", "schedule.warmup=1"])
    folder = tmp_path / "run"
    folder.mkdir()
    stored = yaml.safe_load(recipe.to_yaml())
    del stored["task"], stored["skip_limit"]
    stored["log"] = {"every": 3, "pictures_every": 2, "pictures": 5, "gradients_every": 0, "tensorboard": False}
    stored |= {"stage": 1, "data": stored["data"] | {"broken_limit": 7}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    assert run(recipe, folder, Console(quiet=True)).finished


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a mapping of keys to values, got NoneType"),
        ("- 1", "must be a mapping of keys to values, got list"),
        ("stage: [1]", r"stage must be 1 or 2, got \[1\]"),
        ("task: [1]", r"task must be a name such as stage1, got \[1\]"),
    ],
)
def test_upgrade__odd_recipes_are_one_line_as_a_file_and_in_a_run_folder(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    for read in (lambda: load_recipe(str(path)), lambda: stored_recipe(tmp_path)):
        with pytest.raises(QLIPError, match=message) as raised:
            read()
        assert "recipe.yaml" in str(raised.value) and "\n" not in str(raised.value)
