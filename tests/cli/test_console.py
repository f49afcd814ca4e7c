"""What a log gets: lines instead of a progress bar, and tables that are not broken up."""

from __future__ import annotations

import pytest

from qlip.cli import console
from qlip.cli.evaluation.print_results import print_figures
from qlip.evaluation.evaluators.base import MetricValue

from ..evaluation.test_result import measured, result


def test_progress__nothing_if_the_command_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("qlip.runtime.progress.time.monotonic", lambda: now[0])
    for quiet, lines in ((False, ["measuring: 61 of 100 (61%), 39 s left"]), (True, [])):
        monkeypatch.setattr(console, "_quiet", quiet)
        with console.progress("measuring", 100) as bar:
            for _ in range(61):
                now[0] += 1
                bar.advance()
            now[0] += 0.5
            bar.advance(0)
        assert capsys.readouterr().err.splitlines() == lines


def test_many_figures_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, where side by side they would be folded; a few stay in a line a set."""
    many = {f"figure_{number}": MetricValue(number + 0.25) for number in range(40)}
    few = {"linear": MetricValue(0.5), "knn": MetricValue(0.25)}
    print_figures(
        [
            result(
                measured(evaluator="probe", data="photographs", values=many),
                measured(evaluator="sets", data="drawings", values=few),
            )
        ]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["set", "photographs"] in lines and ["figure_39", "39.250"] in lines
    assert any(line[-2:] == ["0.500", "0.250"] and "drawings" in line for line in lines)
