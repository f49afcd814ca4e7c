"""A result says what it depends on, survives a file, and can be held against another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from qlip import QLIPError
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, MetricValue, Rows
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.report.result import EvalResult, Result, differences


def measured(psnr: float = 28.0, **changes: object) -> EvalResult:
    values = {"psnr": MetricValue(psnr, psnr - 0.1, psnr + 0.1, 100, "dB", "higher")}
    return EvalResult(
        evaluator="reconstruction",
        settings={},
        title="photographs",
        data="cifar10:test",
        count=100,
        limit=100,
        broken=[("cat-7", "truncated")],
        preparation="64x64, bicubic, centre crop",
        as_shipped=True,
        digest="ab" * 32,
        values=values,
    ).model_copy(update=changes)


def result(*rows: EvalResult, fingerprint: str = "cd" * 32) -> Result:
    return Result(
        subject={"name": "mine", "fingerprint": fingerprint},
        measured=list(rows),
        command="qlip eval",
        time="2026-11-24T00:00:00+00:00",
        packages={"torch": "2.13.0"},
        machine="Linux x86_64",
    )


def test_result__a_result_survives_its_file(tmp_path: Path) -> None:
    first = result(measured())
    first.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == first


def test_result__infinite_metrics_survive_too(tmp_path: Path) -> None:
    first = result(measured(float("inf")))
    first.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").measured[0].values["psnr"].value == float("inf")


def test_result__a_full_name_carries_what_the_metric_depends_on() -> None:
    assert measured().full_name("psnr") == "reconstruction/psnr@cifar10:test[n=100, 64x64, bicubic, centre crop]"
    assert "not the checkpoint's own" in measured(as_shipped=False).full_name("psnr")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "no result of qlip eval"),
        ('{"version": 2}', "version 2 of results, this qlip reads 1; update qlip"),
        ('{"subject": {}}', "no result of qlip eval"),
    ],
)
def test_result__what_is_no_result_is_named(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QLIPError, match=says) as raised:
        Result.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_result__what_does_not_hold_is_listed() -> None:
    first = result(measured())
    assert differences(first, result(measured(28.0 + 1e-9))) == []
    (one,) = differences(first, result(measured(28.01)))
    assert one.name.startswith("reconstruction/psnr@") and (one.was, one.now) == (28.0, 28.01)
    assert differences(first, result()) != []
    assert [one.name for one in differences(first, result(measured(), fingerprint="other"))] == [
        "the model's fingerprint"
    ]
    changed = result(measured(count=99, digest="other"))
    assert [one.name for one in differences(first, changed)] == [
        "reconstruction on cifar10:test: count",
        "reconstruction on cifar10:test: digest",
    ]


class Foreign(Evaluator):
    """As another package would have it."""

    name: ClassVar[str] = "foreign"
    needs: ClassVar[frozenset[str]] = frozenset()

    def rows(self, batch: ModelBatch) -> Columns:
        """Nothing."""
        return {}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Nothing."""
        return MetricResult({})


class Point:
    """An entry point that was installed."""

    def __init__(self, name: str, what: object) -> None:
        self.name, self.what = name, what

    def load(self) -> object:
        """What it names."""
        return self.what


def test_result__other_packages_register_evaluators(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("foreign", Foreign), Point("wrong", dict)]
    monkeypatch.setattr("qlip.registry.entry_points", lambda group: points)
    assert isinstance(registry.evaluator("foreign"), Foreign)
    assert set(registry.EVALUATORS) >= {"foreign", "wrong"}
    with pytest.raises(
        QLIPError, match="wrong: its package registered a dict under qlip.evaluators, which is no Evaluator"
    ):
        registry.evaluator("wrong")
    with pytest.raises(QLIPError, match="forein: no such evaluator .did you mean 'foreign'"):
        registry.evaluator("forein")


def test_result__all_of_ours_can_be_made() -> None:
    for name in registry.EVALUATORS:
        settings = {"train": "cifar10:train"} if name == "probe" else {}
        assert registry.evaluator(name, **settings).name == name


def table(psnr: float | str) -> dict[str, list[dict[str, object]]]:
    return {"worst_psnr": [{"key": "cat", "psnr": psnr}]}


@pytest.mark.parametrize(
    ("claimed", "again", "what"),
    [
        (measured(float("inf")), measured(28.0), "psnr@"),
        (measured(28.0), measured(float("inf")), "psnr@"),
        (measured(float("nan")), measured(28.0), "psnr@"),
        (measured(values={"psnr": MetricValue(28.0, 0.0, 99.0, 100)}), measured(28.0), "psnr@.*: interval"),
        (measured(values={"psnr": MetricValue(28.0, 27.9, float("inf"), 100)}), measured(28.0), "psnr@.*: interval"),
        (measured(broken=[]), measured(), "broken images"),
        (measured(), measured(broken=[("dog-1", "truncated")]), "broken images"),
        (measured(tables=table(28.0)), measured(tables=table(29.0)), "table worst_psnr, row 1"),
        (measured(tables=table("Infinity")), measured(tables=table(29.0)), "table worst_psnr, row 1"),
        (measured(tables=table(28.0)), measured(), "table worst_psnr"),
    ],
)
def test_differences__nothing_stands_for_another_value(claimed: EvalResult, again: EvalResult, what: str) -> None:
    (one,) = differences(result(claimed), result(again))
    assert re.search(what, one.name)


def test_differences__equal_infinities_and_reasons_in_other_words_hold(tmp_path: Path) -> None:
    claimed = measured(float("inf"), broken=[("cat-7", "truncated")], tables=table(float("inf")))
    result(claimed).save(tmp_path / "result.json")
    again = measured(float("inf"), broken=[("cat-7", "cut off")], tables=table(float("inf")))
    assert differences(Result.load(tmp_path / "result.json"), result(again)) == []


def test_differences__intervals_of_older_rules_are_not_compared(tmp_path: Path) -> None:
    result(measured(values={"psnr": MetricValue(28.0, 27.0, 29.0, 100)})).save(tmp_path / "result.json")
    old = json.loads((tmp_path / "result.json").read_text())
    del old["intervals"]
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert differences(Result.load(tmp_path / "result.json"), result(measured(28.0))) == []


def test_result__metrics_of_older_results_have_their_new_names(tmp_path: Path) -> None:
    old = measured(values={"psnr": MetricValue(28.0)})
    result(old).save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text().replace('"psnr"', '"precision_vgg16"')
    (tmp_path / "result.json").write_text(text)
    assert list(Result.load(tmp_path / "result.json").measured[0].values) == ["precision_vgg16_relu5"]
