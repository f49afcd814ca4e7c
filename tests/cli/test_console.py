"""What a log gets: lines instead of a progress bar, and tables that are not broken up."""

from __future__ import annotations

import pytest

from qlip.cli import console


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
