"""A list of things to measure becomes one result, one pass a set; the same again after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import pytest

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, Rows, mean
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.report.result import differences
from qlip.evaluation.run.datasets import open_set
from qlip.evaluation.run.evaluate import EvalSpec, Outcome, Ranks, repeatable, run_specs, specs_of
from qlip.evaluation.run.suites import specs_for
from qlip.registry import Registry

IMAGES = str(assets.path("images"))


class Mean(Evaluator):
    """The mean of an image's pixels, times a factor."""

    name: ClassVar[str] = "mean"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def settings(self) -> dict[str, object]:
        """The factor."""
        return {"factor": self.factor}

    def rows(self, batch: ModelBatch) -> Columns:
        """One number an image."""
        return {"mean": batch.model.preprocessing.denormalize(batch.pixel_values).mean((1, 2, 3)) * self.factor}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """The mean."""
        return MetricResult({"mean": mean(rows.column("mean"))}, notes={"mean": "of pixels"})


class Other(Mean):
    """The same by another name."""

    name: ClassVar[str] = "other"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, object] = {name: registry.EVALUATORS[name] for name in registry.EVALUATORS}
    added = {one.name: one for one in (Mean, Other)}
    monkeypatch.setattr(registry, "EVALUATORS", Registry("evaluator", ours | added))


@pytest.fixture(scope="module")
def model() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


ITEMS = [
    EvalSpec("photographs", IMAGES, "mean"),
    EvalSpec("fewer", IMAGES, "mean", limit=2),
    EvalSpec("doubled", IMAGES, "mean", {"factor": 2.0}),
    EvalSpec("photographs", IMAGES, "other"),
]


def test_evaluate__rows_come_in_order_and_say_what_they_are_of(model: QLIPEvalModel, tmp_path: Path) -> None:
    states: list[Outcome] = []
    outcome = run_specs(model, ITEMS, work=tmp_path, on_saved=states.append)
    assert outcome is not None
    rows = outcome.result.measured
    assert [(row.title, row.evaluator) for row in rows] == [(item.title, item.evaluator) for item in ITEMS]
    whole, fewer, doubled, other = (row.values["mean"].value for row in rows)
    assert doubled == pytest.approx(2 * whole) and other == whole and fewer != whole
    assert (rows[1].count, rows[1].limit) == (2, 2) and rows[0].limit is None
    assert rows[0].digest == rows[2].digest != rows[1].digest
    assert outcome.result.subject["fingerprint"] == model.fingerprint
    assert rows[0].notes == {"mean": "of pixels"} and len(outcome.metric_results) == 4
    # what was there after each pass is a result already
    assert [state.result.complete for state in states] == [False, False, True]
    assert [len(state.result.measured) for state in states] == [2, 3, 4]


def test_evaluate__is_verified_by_measuring_what_it_says(model: QLIPEvalModel, tmp_path: Path) -> None:
    first = run_specs(model, ITEMS, work=tmp_path)
    again = run_specs(model, specs_of(first.result))  # type: ignore[union-attr]
    assert differences(first.result, again.result) == []  # type: ignore[union-attr]


def test_repeatable__rows_of_removed_evaluators_are_left_out(model: QLIPEvalModel, tmp_path: Path) -> None:
    outcome = run_specs(model, ITEMS[:1], work=tmp_path)
    assert outcome is not None
    old = outcome.result.measured[0].model_copy(update={"evaluator": "robustness"})
    both = outcome.result.model_copy(update={"measured": [*outcome.result.measured, old]})
    assert repeatable(both).measured == outcome.result.measured
    with pytest.raises(QLIPError, match="nothing to verify"):
        repeatable(outcome.result.model_copy(update={"measured": [old]}))


def test_evaluate__the_other_ranks_give_nothing(model: QLIPEvalModel, tmp_path: Path) -> None:
    run_specs(model, ITEMS[:1], work=tmp_path)
    assert run_specs(model, ITEMS[:1], work=tmp_path, ranks=Ranks(1, 2)) is None


def test_evaluate__everything_is_checked_before_anything_is_measured(model: QLIPEvalModel, tmp_path: Path) -> None:
    def refused(item: EvalSpec, says: str) -> None:
        with pytest.raises(QLIPError, match=says):
            run_specs(model, [ITEMS[0], item], work=tmp_path / "work")
        assert not (tmp_path / "work").exists()

    refused(EvalSpec("x", IMAGES, "maen"), "did you mean 'mean'")
    refused(EvalSpec("x", IMAGES, "mean", {"factro": 1}), "mean.factro: no such setting")
    refused(EvalSpec("x", str(tmp_path / "gone"), "mean"), "gone")


def test_evaluate__labels_of_ones_own_are_part_of_a_sets_name(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        shutil.copy(assets.path("images", f"{name}.jpg"), folder / name / f"{number}.jpg")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    named = open_set(f"{folder}#{tmp_path / 'classes.txt'}")
    assert [named.read(index).label for index in range(2)] == ["cat", "dog"]
    items = specs_for([f"{folder}#{tmp_path / 'classes.txt'}"], ["zero_shot", "reconstruction"])
    assert [item.settings for item in items] == [{"classes": str(tmp_path / "classes.txt")}, {}]
    with pytest.raises(QLIPError, match="gone"):
        open_set(f"{folder}#gone.txt")
