from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qlip import QLIPError, recipes
from qlip.training import load_recipe
from qlip.training.recipe import check_recipe


def one_line(call: pytest.ExceptionInfo[QLIPError]) -> str:
    text = str(call.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", recipes.names())
def test_packaged_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.schedule.steps > 0
    assert load_recipe(name).to_yaml() == recipe.to_yaml()


def test_the_resolved_recipe_is_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(str(again)) == recipe


def test_overrides_reach_into_tables_and_lists(recipe_file: Path) -> None:
    overrides = ["schedule.steps=7", "data.sources.0.flip=0", "optimizer={name: muon}", "log.tensorboard=true"]
    recipe = load_recipe(str(recipe_file), overrides)
    assert recipe.schedule.steps == 7 and recipe.schedule.warmup == 4
    assert recipe.data.sources[0].flip == 0 and recipe.optimizer.name == "muon" and recipe.log.tensorboard


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.step=7", "did you mean 'steps'"),
        ("losses.alpha_x=1", "losses.alpha_x"),
        ("batchsize=3", "did you mean 'batch_size'"),
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("data.sources.0.wieght=2", "did you mean 'weight'"),
        ("data.sources.5.weight=2", "'5' is not a position"),
        ("model={}", "config"),
        ("no-equals-sign", "must be key=value"),
        ("batch_size.inner=1", "has no keys"),
    ],
)
def test_a_wrong_key_is_one_line_with_the_right_one(recipe_file: Path, override: str, expected: str) -> None:
    with pytest.raises(QLIPError) as call:
        load_recipe(str(recipe_file), [override])
    assert expected in one_line(call)


def test_a_missing_key_is_named(recipe_values: dict, tmp_path: Path) -> None:
    del recipe_values["batch_size"]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    with pytest.raises(QLIPError, match="'batch_size' is missing"):
        load_recipe(str(path))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{ not: [closed")
    (tmp_path / "b.yaml").write_text("- just\n- a list\n")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    for name, expected in (("a.yaml", "not YAML"), ("b.yaml", "mapping of keys"), ("c.yaml", "not YAML")):
        with pytest.raises(QLIPError, match=expected) as call:
            load_recipe(str(tmp_path / name))
        one_line(call)
    with pytest.raises(QLIPError, match="did you mean 'nano/stage1'"):
        load_recipe("nano/stage11")


def test_a_resolved_recipe_spells_out_the_order_so_that_runs_of_before_stay_runs(recipe_values: dict) -> None:
    stored = check_recipe(recipe_values, "it").model_dump(mode="json")
    assert [source["order"] for source in stored["data"]["sources"]] == ["shuffle"]
    for order in ({}, {"order": None}, {"order": "shuffle"}):
        recipe_values["data"]["sources"][0] |= order
        assert check_recipe(recipe_values, "it").model_dump(mode="json") == stored
