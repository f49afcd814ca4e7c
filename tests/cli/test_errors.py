"""How the command fails: one line, the right exit code, nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlip.cli.main import app
from tests.cli.conftest import Command, picture


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
        (["train", "nano/stage9"], "nano/stage9"),
        (["data", "get", "imagenet"], "imagenet: no such dataset"),
    ],
)
def test_typed_wrong_is_one_line_and_code_2(qlip: Command, arguments: list[str], said: str) -> None:
    ran = qlip(*arguments)
    assert (ran.code, ran.out, len(ran.error_lines)) == (2, "", 1)
    assert ran.err.startswith("qlip: ") and said in ran.err


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "gpu"])
def test_an_unknown_device(qlip: Command, photos: Path, model: Path, device: str) -> None:
    ran = qlip("encode", photos, "--device", device, "-m", model)
    assert ran.code == 2 and len(ran.error_lines) == 1
    assert f"--device {device}: this machine has " in ran.err


@pytest.mark.parametrize(
    ("name", "said"),
    [("qlip-nano-46", "qlip-nano-64"), ("./no/such/folder", "no such folder"), ("a/b/c", "no such folder")],
)
def test_an_unknown_model(qlip: Command, photos: Path, name: str, said: str) -> None:
    ran = qlip("encode", photos, "-m", name)
    assert ran.code == 1 and len(ran.error_lines) == 1
    assert ran.err.startswith(f"qlip: {name}: ") and said in ran.err


def test_a_folder_that_is_no_checkpoint(qlip: Command, photos: Path) -> None:
    ran = qlip("encode", photos, "-m", photos)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "config.json" in ran.err


def test_a_missing_token_file(qlip: Command) -> None:
    ran = qlip("info", "missing.qlip")
    assert ran.code == 1 and ran.error_lines[0].startswith("qlip: missing.qlip: cannot be read")


def test_a_folder_that_cannot_be_written(qlip: Command, photos: Path, model: Path) -> None:
    Path("taken").write_text("a file")
    ran = qlip("encode", photos / "cat.png", "-o", "taken", "-m", model)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "taken" in ran.err


def test_debug_shows_the_traceback_wherever_it_stands(qlip: Command) -> None:
    for arguments in (["--debug", "info", "missing.qlip"], ["info", "missing.qlip", "--debug"]):
        ran = qlip(*arguments)
        assert ran.code == 1
        assert "Traceback" in ran.err and "QLIPError" in ran.err


def test_every_command_has_a_page_of_help(qlip: Command) -> None:
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


def test_version(qlip: Command) -> None:
    from qlip import __version__

    assert qlip("--version").out == f"qlip {__version__}\n"


def test_the_data_sets_are_listed(qlip: Command) -> None:
    report = qlip("data", "list", "--cache", "nothing-here", "--json").json
    assert report["cache"] == "nothing-here"
    assert {one["name"] for one in report["results"]} >= {"cifar10", "emoji", "clipart"}
    assert not any(one["here"] for one in report["results"])
    assert "cifar10" in qlip("data", "list").out


def test_ctrl_c_keeps_finished_files_and_says_how_to_go_on(tmp_path: Path, model: Path) -> None:
    one = picture(tmp_path / "many" / "000.png", (400, 300))
    for number in range(1, 300):
        (one.parent / f"{number:03d}.png").hardlink_to(one)
    command = [sys.executable, "-m", "qlip", "encode", "many", "-o", "out", "-m", str(model), "--batch-size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/*.qlip")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == ["stopped; finished files are kept; the same command with --skip-existing goes on"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert 0 < len(written) < 300 and all(name.endswith(".qlip") for name in written)
    assert subprocess.run([*command, "--skip-existing"], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert len(list((tmp_path / "out").glob("*.qlip"))) == 300


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qlip --help | head -c 10"
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
