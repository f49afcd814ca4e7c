"""A log gets lines of progress instead of a bar; quick work, other ranks and quiet commands print nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qlip.runtime.progress import duration, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only place."""
    now = [1000.0]
    monkeypatch.setattr("qlip.runtime.progress.time.monotonic", lambda: now[0])
    monkeypatch.delenv("RANK", raising=False)
    return now


def test_progress__a_log_gets_a_line_per_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Time left follows this run's speed: the first call may count the work of an earlier run."""
    with progress("measuring", 4000) as bar:
        bar.advance(1000)
        for _ in range(150):
            clock[0] += 1
            bar.advance(10)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "measuring: 1,610 of 4,000 (40%), 4 min left",
        "measuring: 2,220 of 4,000 (56%), 3 min left",
    ]
    assert not captured.out


def test_progress__a_line_has_unit_and_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Also for a single shard with an unknown number of images: nothing is done yet, but the speed is known."""
    for total, unit, steps in ((4000, "images", 10), (1, "shards", 0)):
        with progress(f"tokenising {unit}", total, unit=unit) as bar:
            for _ in range(62):
                bar.advance(steps, "10.0 images/s")
                clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "620 of 4,000 images (16%), 10.0 images/s, 6 min left",
        "0 of 1 shards (0%), 10.0 images/s, 61 s left",
    ]


def test_progress__an_unknown_total_is_left_out(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("fetching", None) as bar:
        for _ in range(62):
            bar.advance(100)
            clock[0] += 1
    assert capsys.readouterr().err == "fetching: 6,200\n"


def test_progress__quick_work_and_other_ranks_print_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do a single step and a quiet command."""

    def slow(total: int, quiet: bool = False) -> None:
        with progress("measuring", total, quiet=quiet) as bar:
            for _ in range(total):
                bar.advance()
                clock[0] += 100

    with progress("quick", 1000) as bar:
        for _ in range(1000):
            clock[0] += 0.01
            bar.advance()
    slow(1)
    slow(10, quiet=True)
    monkeypatch.setenv("RANK", "1")
    slow(10)
    assert not capsys.readouterr().err


def test_progress__a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for total in (3, None):
        terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
        with progress("doing", total, console=terminal) as bar:
            bar.advance(3)
            bar.bar.refresh()
        shown = terminal.file.getvalue()  # type: ignore[attr-defined]
        assert "doing" in shown and ("3/3" if total else "3/?") in shown
    assert capsys.readouterr() == ("", "")


def test_duration__in_seconds_minutes_or_hours() -> None:
    assert [duration(seconds) for seconds in (0, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
