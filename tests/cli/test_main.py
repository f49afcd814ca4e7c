"""The command line as a whole: order of commands, verbosity, completion, ``python -m qlip``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlip.cli.main import ORDER, run
from tests.cli.conftest import Command


def test_help__lists_the_commands_in_the_order_in_which_a_person_meets_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--help"]) == 0
    listed = re.findall(r"^│ ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ORDER.split() and len(listed) <= 17


def test_python_m_qlip__is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "qlip", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"qlip \d+\.\d+\.\d+\n", ran.stdout)


def test_completion__offers_commands_and_options() -> None:
    def offered(typed: str) -> list[str]:
        environment = os.environ | {"_QLIP_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": typed}
        ran = subprocess.run(
            [sys.executable, "-m", "qlip"], capture_output=True, text=True, check=True, env=environment
        )
        return re.findall(r'"([\w-]+)"', ran.stdout)

    assert offered("qlip en") == ["encode"]
    assert "--entropy-code" in offered("qlip encode --entropy")


def test_quiet__prints_results_and_errors_only(qlip: Command, model: Path, photos: Path) -> None:
    arguments = ["tokenize", str(photos), "-o", "tokens", "-m", str(model), "--workers", "0"]
    quiet = qlip("-q", *arguments)
    assert quiet.code == 0 and quiet.err == "" and "tokens" in quiet.out
    assert qlip("-q", "encode", "absent.jpg", "-m", model).err.startswith("qlip: absent.jpg")
