"""Commands in README, docs, the model's card and help texts exist, with the options that they are shown with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer

from qlip.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    + [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]  # the log keeps commands of its day
    + list((ROOT / "src" / "qlip").rglob("*.md"))
    + list((ROOT / "src" / "qlip" / "recipes").rglob("*.yaml"))
)
COMMANDS: Any = typer.main.get_command(app)


def commands_of(text: str) -> Iterator[str]:
    """Command lines: whole lines of code blocks, comments in recipes, and inline code."""
    text = text.replace("\\\n", " ")
    yield from re.findall(r"^(?:    |#   )(?:[A-Z]+=\S+ )*(?:\S*/)?(qlip .*)$", text, re.MULTILINE)
    yield from re.findall(r"`(qlip [^`]+)`", text)


def problem_of(line: str) -> str | None:
    """The reason why a command line cannot be typed; None if it can."""
    command, words = COMMANDS, shlex.split(line.split(" # ")[0])[1:]
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    group = hasattr(command, "commands") and not command.invoke_without_command
    if group and words and re.fullmatch("[a-z-]+", words[0]) and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--debug"}
    for word in words:
        option = word.split("=")[0]
        if re.fullmatch(r"--[a-z-]+|-[a-z]", option) and option not in known:
            return f"no option {option}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages__show_commands_that_exist(page: Path) -> None:
    wrong = []
    for line in commands_of(page.read_text(encoding="utf-8")):
        try:
            problem = problem_of(line)
        except ValueError as error:  # an unclosed quote
            problem = str(error)
        if problem is not None:
            wrong.append(f"{line}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_pages__many_commands_are_found() -> None:
    """The test above would pass over pages whose commands it does not recognise."""
    assert sum(len(list(commands_of(page.read_text()))) for page in PAGES) > 150


def test_contributing__index_leads_to_what_exists() -> None:
    rows = re.findall(r"^\| [^|]+\? \| `([\w.]+):([\w.]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == 10
    for module, name in rows:
        attrgetter(name)(import_module(module))
