from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qlip.training.log.environment import record_session
from qlip.training.log.runlog import Clock, RunLog, SilentLog


def console() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(log_console: Console) -> str:
    assert isinstance(log_console.file, io.StringIO)
    return log_console.file.getvalue()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- what a line says


def test_a_line_has_speed_waiting_memory_time_left_and_utilisation(tmp_path: Path) -> None:
    out = console()
    log = RunLog(tmp_path, 0, 100, False, out, flops=2e6, peak=1e9)
    for _ in range(10):
        log.clock.step(0.001, 4)
    time.sleep(0.05)
    log.write(10, {"mse": 0.25}, 40)
    log.close()
    (line,) = lines(tmp_path)
    assert line["step"] == 10 and line["samples"] == 40 and line["mse"] == 0.25 and "kind" not in line
    seconds = 40 / line["samples_per_s"]
    assert seconds > 0.05
    assert line["data_wait"] == pytest.approx(0.01 / seconds)
    assert line["seconds_left"] == pytest.approx(90 * seconds / 10)
    assert line["mfu"] == pytest.approx(2e6 * line["samples_per_s"] / 1e9)
    assert 0.01 < line["peak_memory_gib"] < 100
    assert "mse 0.25" in said(out) and "mfu" in said(out)


def test_a_device_that_nobody_knows_has_no_utilisation(tmp_path: Path) -> None:
    out = console()
    log = RunLog(tmp_path, 0, 100, False, out, flops=2e6, peak=None)
    log.clock.step(0.0, 4)
    log.write(1, {}, 4)
    assert "mfu" not in lines(tmp_path)[0] and "mfu" not in said(out)


def test_validation_is_no_training_time_but_is_part_of_the_time_left(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(2):
        clock.step(0.0, 3)
    with clock.paused():
        time.sleep(0.2)
    assert clock.lap().seconds < 0.2
    assert clock.paused_a_step() >= 0.1
    time.sleep(0.03)
    assert clock.lap().seconds >= 0.03  # what was taken off once is not taken off again


def test_lines_after_the_step_a_run_goes_on_from_are_dropped_of_both_kinds(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 10, False, console())
    for step in range(1, 6):
        log.write(step, {"mse": 1 / step}, step)
        log.validation(step, "cifar10:test", {"psnr": 20.0 + step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "ms')  # killed while it wrote
    before = lines_of_steps(tmp_path, 3)
    log = RunLog(tmp_path, 3, 10, False, console())
    assert lines(tmp_path) == before
    log.validation(4, "cifar10:test", {"psnr": 24.0})
    log.close()
    assert lines(tmp_path) == [*before, {"step": 4, "kind": "validation", "val/cifar10:test/psnr": 24.0}]


def lines_of_steps(folder: Path, last: int) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[:-1]]
    return [line for line in found if line["step"] <= last]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = SilentLog()
    assert log.silent and not RunLog.silent
    log.clock.step(0.1, 2)
    log.write(1, {"mse": 1.0}, 2)
    log.validation(1, "a", {"psnr": 1.0})
    log.image(1, torch.zeros(3, 4, 4))
    log.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard__has_curves_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, 10, True, console())
    log.write(1, {"mse": 0.5}, 4)
    log.validation(1, "faces", {"psnr": 21.0})
    log.image(1, torch.rand(3, 8, 8))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("mse")[0].value == 0.5 and board.Scalars("val/faces/psnr")[0].value == 21.0
    assert len(board.Images("originals above reconstructions")) == 1


# ---------------------------------------------------------------- Weights & Biases, offline


def records(path: Path) -> Iterator[Any]:
    """Of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes, a protobuf message each."""
    from wandb.proto import wandb_internal_pb2

    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        position += 7 + length
        message = body if kind in (1, 2) else message + body
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(message)


def sent(folder: Path) -> tuple[list[tuple[str, str]], dict[int, dict[str, Any]]]:
    """(project, id) of all starts, and the rows by step, of a run folder."""
    runs, rows = [], dict[int, dict[str, Any]]()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            if record.HasField("run"):
                runs.append((record.run.project, record.run.run_id))
            if record.HasField("history"):
                row = {".".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
                rows[row["_step"]] = row
    return runs, rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    import wandb

    wandb.teardown()


def test_wandb_goes_on_in_the_same_run(offline: None, tmp_path: Path) -> None:
    import wandb

    out = console()
    log = RunLog(tmp_path, 0, 10, False, out, wandb="tokenizers", name="nano", config={"batch_size": 6})
    for step in (1, 2, 3):
        log.write(step, {"mse": 1 / step}, 6 * step)
    log.validation(3, "faces", {"psnr": 21.0})
    log.image(3, torch.rand(3, 8, 16))
    log.close()
    stored = json.loads((tmp_path / "wandb/run.json").read_text())
    assert stored.keys() == {"project", "id"}  # nothing secret
    log = RunLog(tmp_path, 2, 10, False, out, wandb="tokenizers", name="nano", config={"batch_size": 6})
    for step in (3, 4):
        log.write(step, {"mse": 1 / step}, 6 * step)
    log.close()
    wandb.teardown()  # its own process writes the files, and is done when it has ended
    runs, rows = sent(tmp_path)
    assert runs == [("tokenizers", stored["id"])] * 2
    assert sorted(rows) == [1, 2, 3, 4] and rows[4]["mse"] == 0.25 and rows[4]["samples"] == 24
    images = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(images) == 1
    assert said(out).count(f"run {stored['id']} of tokenizers, offline") == 2


def test_a_failure_of_wandb_is_one_warning(offline: None, tmp_path: Path) -> None:
    import wandb

    out = console()
    log = RunLog(tmp_path, 0, 10, False, out, wandb="tokenizers")
    assert wandb.run is not None
    wandb.run.finish()  # behind the log's back
    for step in (1, 2):
        log.write(step, {"mse": 1.0}, step)
        log.image(step, torch.rand(3, 8, 8))
    log.close()
    assert said(out).count("Weights & Biases failed") == 1 and "is finished" in said(out)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_without_an_account_the_run_starts_all_the_same(offline: None, tmp_path: Path) -> None:
    """Online, no key, no terminal to ask for one: in a process of its own, for W&B reads its environment once."""
    code = (
        "import pathlib, sys\nfrom rich.console import Console\nfrom qlip.training.log.runlog import RunLog\n"
        "log = RunLog(pathlib.Path(sys.argv[1]), 0, 10, False, Console(width=400), wandb='tokenizers')\n"
        "log.write(1, {'mse': 1.0}, 1)\nlog.close()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Weights & Biases failed") == 1 and "training continues" in ran.stdout
    assert len(lines(tmp_path)) == 1


# ---------------------------------------------------------------- what a run ran on


def test_a_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qlip", "train", "my recipe.yaml"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    record_session(tmp_path)
    record_session(tmp_path)
    first, second = json.loads((tmp_path / "sessions.json").read_text())
    assert first["command"] == "qlip train 'my recipe.yaml'" and first["ranks"] == 4 and first["devices"]
    assert first["packages"]["torch"] == torch.__version__ and "cuda" in first and "git" in first
    assert second["packages"] == first["packages"]
    assert "a-secret" not in (tmp_path / "sessions.json").read_text()
