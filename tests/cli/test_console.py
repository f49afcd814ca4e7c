"""Progress where nobody watches: lines in a log instead of a bar."""

from __future__ import annotations

import pytest

from qlip.cli import console


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


def test_quick_work_and_other_ranks_say_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a single step, nor a command that says its own lines."""

    def slow(total: int, lines: bool = True) -> None:
        with console.progress("measuring", total, lines=lines) as bar:
            for _ in range(total):
                bar.advance()
                clock[0] += 100

    with console.progress("quick", 1000) as bar:
        for _ in range(1000):
            clock[0] += 0.01
            bar.advance()
    slow(1)
    slow(10, lines=False)
    monkeypatch.setenv("RANK", "1")
    slow(10)
    assert not capsys.readouterr().err
