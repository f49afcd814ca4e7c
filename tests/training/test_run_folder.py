from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qlip import QLIPError
from qlip.training.job import find_kind
from qlip.training.recipe import check_recipe
from qlip.training.run_folder import reserved


def test_reserved__a_key_that_an_older_run_lacks_is_compared_with_its_default(
    recipe_values: dict[str, Any], tmp_path: Path
) -> None:
    recipe = check_recipe(recipe_values, "test")
    stored = recipe.model_dump(mode="json")
    del stored["spikes"], stored["data"]["sources"][0]["blur"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    kind = find_kind(recipe.task, "test")
    with reserved(tmp_path, recipe, kind, restart=False):
        pass
    recipe_values["data"]["sources"][0]["blur"] = 0.5
    blurred = check_recipe(recipe_values, "test")
    with (
        pytest.raises(QLIPError, match=r"another recipe: data\.sources\.0\.blur \(0\.0, now 0\.5\)"),
        reserved(tmp_path, blurred, kind, restart=False),
    ):
        pass


def test_reserved__resumes_a_run_whose_recipe_has_keys_that_are_refused_now(
    recipe_values: dict[str, Any], tmp_path: Path
) -> None:
    recipe = check_recipe(recipe_values | {"losses": {"alpha_a": 0}}, "test")
    stored = recipe.model_dump(mode="json")
    stored["accumulation"] = "mean"  # without micro-batches
    stored["vocabulary"] = {"size": 600}  # beside a checkpoint
    stored["losses"]["align"]["chunk_size"] = 8  # without alignment
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    with reserved(tmp_path, recipe, find_kind(recipe.task, "test"), restart=False):
        pass
