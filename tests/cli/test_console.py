"""What a log gets: lines instead of a progress bar, and tables that are not broken up."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qlip.cli import console
from qlip.errors import QLIPWarning
from qlip.runtime.progress import print_line


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


HOSTILE = "key\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\u202eend"
ESCAPED = r"key\u001b]0;title\u0007\u001b[2J\u009b31m\u007f\u000d\u202eend"


def test_console__escapes_control_codes_in_all_output(capsys: pytest.CaptureFixture[str]) -> None:
    table = console.new_table("key", "caption")
    table.add_row(HOSTILE, "Aachen\nönd 👩‍🚀")
    console.print_table(table)
    console.show(f"{HOSTILE}\n\tnext")
    console.print_json({"key": HOSTILE})
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split("  ") == [ESCAPED, "Aachen önd 👩‍🚀"]
    assert lines[2:4] == [ESCAPED, "\tnext"]
    assert json.loads("\n".join(lines[4:])) == {"key": HOSTILE}

    console.say(f"{HOSTILE}: broken")
    console.Failures().add(HOSTILE, ValueError(HOSTILE))
    console.show_warning(QLIPWarning(HOSTILE), QLIPWarning, "file", 1)
    console.show_warning(UserWarning(HOSTILE), UserWarning, "file", 1)
    console.show_traceback(ValueError(HOSTILE))
    err = capsys.readouterr().err
    assert not set(out + err) & {"\x1b", "\x07", "\x9b", "\x7f", "\r", "\u202e"}
    assert err.splitlines()[0] == ESCAPED.replace(r"\u000d", " ") + ": broken"


def test_print_line__escapes_control_codes() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=20)
    print_line(screen, f"skipped {HOSTILE} [red]")
    assert screen.file.getvalue() == f"skipped {ESCAPED} [red]\n"  # type: ignore[attr-defined]


def test_commands__print_through_the_console_alone() -> None:
    folder = Path(console.__file__).parent
    for path in folder.rglob("*.py"):
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert path.name == "console.py" or "print" not in calls, f"{path}: print with qlip.cli.console.show"
