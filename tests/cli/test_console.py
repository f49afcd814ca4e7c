"""What a log gets: lines instead of a progress bar, and tables that are not broken up."""

from __future__ import annotations

import pytest

from qlip.cli import console
from qlip.cli.evaluation.print_results import print_figures
from qlip.evaluation.evaluators.base import Value
from qlip.evaluation.report.result import figures

from ..evaluation.test_result import measured, result


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only place."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("RANK", raising=False)
    return now


def test_a_log_gets_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Time left is by the speed of this run: the first step may be what an earlier one had done."""
    with console.progress("measuring", 4000) as bar:
        bar.advance(1000)
        for _ in range(150):
            clock[0] += 1
            bar.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 1,610 of 4,000 (40%), 4 min left",
        "measuring: 2,220 of 4,000 (56%), 3 min left",
    ]


def test_a_unit_and_a_speed_stand_in_the_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a single shard whose images nobody has counted too: nothing is done yet, but the speed is known."""
    for total, unit, steps in ((4000, "images", 10), (1, "shards", 0)):
        with console.progress(f"tokenising {unit}", total, unit=unit) as bar:
            for _ in range(62):
                bar.advance(steps, "10.0 images/s")
                clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "620 of 4,000 images (16%), 10.0 images/s, 6 min left",
        "0 of 1 shards (0%), 10.0 images/s, 61 s left",
    ]


def test_quick_work_and_other_ranks_say_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a single step."""

    def slow(total: int) -> None:
        with console.progress("measuring", total) as bar:
            for _ in range(total):
                bar.advance()
                clock[0] += 100

    with console.progress("quick", 1000) as bar:
        for _ in range(1000):
            clock[0] += 0.01
            bar.advance()
    slow(1)
    monkeypatch.setenv("RANK", "1")
    slow(10)
    assert not capsys.readouterr().err


def test_many_figures_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, where side by side they would be folded; a few stay in a line a set."""
    many = figures({f"figure_{number}": Value(number + 0.25) for number in range(40)})
    few = figures({"linear": Value(0.5), "knn": Value(0.25)})
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
