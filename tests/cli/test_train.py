"""`qlip train` and `qlip data`, from the outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qlip import QLIPModel
from tests.cli.conftest import Command


@pytest.fixture
def recipe(tmp_path: Path, model: Path, photos: Path) -> Path:
    """A run of a few steps from the small checkpoint, on three images without captions."""
    values = {
        "name": "small",
        "model": {"init": str(model)},
        "data": {"sources": [{"path": str(photos)}], "num_workers": 0},
        "batch_size": 2,
        "schedule": {"steps": 3},
        "log": {"every": 1, "images_every": 0, "tensorboard": False},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train__model_works_with_every_command(qlip: Command, recipe: Path, model: Path, photos: Path) -> None:
    ran = qlip("train", recipe, "schedule.steps=2", "-o", "run", "--json")
    assert ran.code == 0
    assert ran.json == {"folder": "run", "finished": True, "step": 2, "model": "run/model"}
    trained = QLIPModel.from_pretrained("run/model")
    assert trained.code_fingerprint != QLIPModel.from_pretrained(model).code_fingerprint
    assert qlip("encode", photos, "-m", "run/model", "-o", "tokens").code == 0
    assert qlip("decode", "tokens", "-m", "run/model", "-o", "rebuilt").code == 0


def test_train__earlier_run_is_continued_or_restarted(qlip: Command, recipe: Path) -> None:
    qlip("train", recipe, "-o", "run")
    before = Path("run/log.jsonl").read_text()
    assert qlip("train", recipe, "-o", "run").code == 0  # nothing left to do
    assert Path("run/log.jsonl").read_text() == before
    ran = qlip("train", recipe, "batch_size=3", "-o", "run")
    assert ran.code == 1 and ran.error_lines[-1].startswith("qlip: run: was started with another recipe: batch_size")
    assert qlip("train", recipe, "batch_size=3", "-o", "run", "--restart").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nano/stagee1"], "did you mean 'nano/stage1'"),
        (["nano/stage1", "batch_sise=3"], "did you mean 'batch_size'"),
        (["nano/stage1", "batch_size"], "an override must be key=value"),
        (["missing.yaml"], "missing.yaml: no such recipe or file"),
    ],
)
def test_train__wrong_recipe(qlip: Command, arguments: list[str], said: str) -> None:
    ran = qlip("train", *arguments)
    assert (ran.code, len(ran.error_lines)) == (2, 1) and said in ran.err


def test_train__ctrl_c_saves(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlip", "train", str(recipe), "schedule.steps=100000", "-o", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline, log = time.monotonic() + 60, tmp_path / "run" / "log.jsonl"
        # the file is opened before the first step; until that is taken there is nothing to save
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("stopped at step ")
    assert said.splitlines()[-1].endswith(", saved; run the same command to continue")
    assert "Traceback" not in said
