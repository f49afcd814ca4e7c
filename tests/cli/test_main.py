"""The command line as a whole: order of commands, verbosity, completion, ``python -m qlip``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from qlip.cli import main as main_module
from qlip.cli.main import ORDER, app, run
from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encode"], "Missing argument 'IMAGE...'"),
        (["encode", "nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["encode", "*.jpg"], "*.jpg: no file matches this pattern"),
        (["encode", "."], ".: this folder holds no image"),
        (["decode", "."], ".: this folder holds no .qlip file"),
        (["encode", "x", "--sizes", "3"], "No such option"),
        (["encode", "x", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["encode", "x", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["eval", "runs/a b", "-o", "out"], "'runs/a b'. To measure a model: qlip eval -m 'runs/a b' -o DIR"),
        (["train", "nano/stage9"], "nano/stage9"),
        (["data", "get", "imagenet"], "imagenet: no such dataset"),
    ],
)
def test_main__wrong_usage_is_one_line_and_code_2(qlip: Command, arguments: list[str], said: str) -> None:
    ran = qlip(*arguments)
    assert (ran.code, ran.out, len(ran.error_lines)) == (2, "", 1)
    assert ran.err.startswith("qlip: ") and said in ran.err


def test_main__a_name_that_is_not_utf_8_is_one_line(qlip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(*_: object, **__: object) -> None:
        "d\udce9/tokens".encode()

    monkeypatch.setattr(main_module, "app", info)
    ran = qlip("info", "d")
    assert ran.code == 1 and ran.err.startswith("qlip: d\\udce9/tokens: is not UTF-8, and this command"), ran.err

    def tokens(*_: object, **__: object) -> None:
        ("a" * 50_000 + "d\udce9/tokens" + "b" * 50_000).encode()

    monkeypatch.setattr(main_module, "app", tokens)
    ran = qlip("info", "d")
    assert ran.code == 1 and "aad\\udce9/tokensbb" in ran.err and len(ran.err) < 400


def test_debug__shows_the_traceback_anywhere_in_the_command(qlip: Command) -> None:
    for arguments in (["--debug", "info", "missing.qlip"], ["info", "missing.qlip", "--debug"]):
        ran = qlip(*arguments)
        assert ran.code == 1
        assert "Traceback" in ran.err and "QLIPError" in ran.err


def test_help__every_command_has_a_page(qlip: Command) -> None:
    page = qlip("--help").out
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert name in page
        ran = qlip(name, "--help")
        assert ran.code == 0 and "Usage: qlip " + name in ran.out
    assert qlip("data", "list", "--help").code == 0 and "eval" in page
    for name in ("statistics", "generated"):
        assert f"Usage: qlip eval {name}" in qlip("eval", name, "--help").out and name in qlip("eval", "--help").out
    assert qlip().out == page
    assert "Exit codes" in page


def test_version__is_the_packages(qlip: Command) -> None:
    from qlip import __version__

    assert qlip("--version").out == f"qlip {__version__}\n"


def test_main__closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qlip --help | head -c 10"
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""


def test_help__lists_the_commands_in_the_order_in_which_a_person_meets_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--help"]) == 0
    listed = re.findall(r"^│ ([a-z0-9]+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ORDER.split() and len(listed) <= 22


def test_python_m_qlip__is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "qlip", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"qlip \d+\.\d+\.\d+(\.dev\d+)?\n", ran.stdout)


def test_completion__offers_commands_and_options() -> None:
    def offered(typed: str) -> list[str]:
        environment = os.environ | {"_QLIP_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": typed}
        ran = subprocess.run(
            [sys.executable, "-m", "qlip"], capture_output=True, text=True, check=True, env=environment
        )
        return re.findall(r'"([\w-]+)"', ran.stdout)

    assert offered("qlip en") == ["encode"]
    assert "--entropy-code" in offered("qlip encode --entropy")


def test_import__loads_neither_torch_nor_numpy() -> None:
    """Help and completion stay fast."""
    script = "import sys, qlip.cli.main; print({'torch', 'numpy', 'PIL', 'huggingface_hub'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_help__begins_with_a_capital_and_ends_with_a_full_stop() -> None:
    def options(command: Any, path: str) -> Iterator[tuple[str, str]]:
        yield path, command.help
        for parameter in command.params:
            if parameter.name not in ("help", "install_completion", "show_completion"):
                yield f"{path} {parameter.opts[0]}", parameter.help or ""
        for name, sub in getattr(command, "commands", {}).items():
            yield from options(sub, f"{path} {name}")

    texts = dict(options(typer.main.get_command(app), "qlip"))
    assert len(texts) > 250
    wrong = [path for path, text in texts.items() if not re.match(r"[A-Z`.].*[.)]$", text, re.DOTALL)]
    assert not wrong


def test_quiet__prints_results_and_errors_only(qlip: Command, model: Path, photos: Path) -> None:
    arguments = ["tokenize", str(photos), "-o", "tokens", "-m", str(model), "--workers", "0"]
    quiet = qlip("-q", *arguments)
    assert quiet.code == 0 and quiet.err == "" and "tokens" in quiet.out
    assert qlip("-q", "encode", "absent.jpg", "-m", model).err.startswith("qlip: absent.jpg")
