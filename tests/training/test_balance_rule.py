"""The balance rule on logs whose numbers are known, and the recipes it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.training.recipe import check_recipe, load_recipe
from qlip.training.studies import balance_rule


def log(folder: Path, values: list[dict[str, float]], every: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": every * number} | line) for number, line in enumerate(values, 1)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_losses_are_read_over_the_last_quarter_above_their_floor(tmp_path: Path) -> None:
    early = [{"align": 99.0, "align_floor": 0.0}] * 24
    # loss and floor scatter together: what is above the floor is 1.5 and 1.3 by turns
    late = [{"align": 1.5 + 0.1 * (n % 3), "align_floor": 0.1 * (n % 3) + 0.2 * (n % 2)} for n in range(8)]
    found = balance_rule.converged(log(tmp_path, early + late), "alignment")
    assert (found.lines, found.still_falling) == (8, False)
    assert found.loss == pytest.approx(1.5 + 0.1 * (0 + 1 + 2 + 0 + 1 + 2 + 0 + 1) / 8)
    assert found.excess == pytest.approx(1.4)
    assert found.spread == pytest.approx(0.1 * (8 / 7) ** 0.5)
    assert found.drift == pytest.approx(0, abs=1e-12)


def test_a_loss_that_still_falls_is_noticed(tmp_path: Path) -> None:
    falling = [{"mse": 1 / n} for n in range(1, 41)]
    found = balance_rule.converged(log(tmp_path, falling), "reconstruction")
    assert found.still_falling and found.floor == 0
    assert found.drift == pytest.approx(sum(1 / n for n in range(31, 36)) / 5 - sum(1 / n for n in range(36, 41)) / 5)


def test_the_rule_in_two_digits(tmp_path: Path) -> None:
    log(tmp_path / "alignment", [{"align": 3.0, "align_floor": 1.13}] * 16)
    log(tmp_path / "reconstruction", [{"mse": 0.0143}] * 16)
    rule = balance_rule.read_rule(tmp_path)
    assert rule.ratio == pytest.approx(1.87 / 0.0143) and rule.alpha_r == 130
    recipe = load_recipe("ablation/stage1", ["losses.alpha_a=0.5", "seed=7"])
    result = balance_rule.balanced(balance_rule.checked(recipe, "it"), rule)
    assert (result.losses.alpha_r, result.losses.alpha_a) == (130, 1)
    same = result.model_copy(update={"losses": recipe.losses})
    assert same == recipe


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"mse": 1.0}] * 16, "its last lines have no align; alignment needs data with captions"),
        ([{"align": 1.0}] * 8, "2 lines in its last quarter, at least 4 are needed"),
        ([{"align": 1.0, "align_floor": 1.0}] * 16, "is not above its floor"),
    ],
)
def test_logs_that_give_no_rule(tmp_path: Path, values: list[dict[str, float]], said: str) -> None:
    log(tmp_path / "alignment", values)
    log(tmp_path / "reconstruction", [{"mse": 0.01}] * 16)
    with pytest.raises(QLIPError, match=said):
        balance_rule.read_rule(tmp_path)


def test_each_objective_alone_keeps_the_rest(recipe_values: dict) -> None:
    recipe = balance_rule.checked(check_recipe(recipe_values, "test"), "test")
    words, pixels = (balance_rule.alone(recipe, objective, 800) for objective in balance_rule.OBJECTIVES)
    assert (words.losses.alpha_r, words.losses.alpha_a, words.losses.alpha_q) == (0, 1, 1)
    assert (pixels.losses.alpha_r, pixels.losses.alpha_a, pixels.losses.alpha_q) == (30, 0, 1)
    for one in (words, pixels):
        assert (one.schedule.steps, one.schedule.warmup, one.log.every) == (800, 4, 3)
        assert one.data == recipe.data and one.optimizer == recipe.optimizer and one.losses.commitment == 0.25
    assert balance_rule.alone(recipe, "alignment", 40).log.every == 1


def test_what_the_rule_does_not_weigh(recipe_values: dict) -> None:
    by_itself = check_recipe(recipe_values | {"losses": {"balance": "uncertainty"}}, "it")
    with pytest.raises(QLIPError, match=r"it: losses\.balance=uncertainty sets weights automatically"):
        balance_rule.checked(by_itself, "it")
    with pytest.raises(QLIPError, match="this is stage 2"):
        balance_rule.checked(check_recipe(recipe_values | {"stage": 2, "losses": {"alpha_g": 0}}, "it"), "it")
