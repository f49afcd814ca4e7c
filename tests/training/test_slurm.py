"""The batch file for SLURM: real shell, real torchrun, and stand-ins for SLURM's own commands, which are not here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlip import recipes

SCRIPT = recipes.folder() / "slurm" / "stage1.sbatch"
COMMANDS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\necho $$ > "$STANDINS/step"\nexec "$@"',
    "scancel": 'kill -"${1#--signal=}" "$(cat "$STANDINS/step")"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$2" > "$STANDINS/requeued"; fi',
}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, body in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STANDINS": str(commands),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_it_asks_for_a_notice_and_says_how_it_is_used(tmp_path: Path) -> None:
    asked = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(asked)
    process = start(tmp_path, "nano/stage1")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "RECIPE RUN_FOLDER" in output


@pytest.mark.slow
def test_a_notice_saves_and_the_job_goes_back_until_the_run_is_finished(recipe_file: Path, tmp_path: Path) -> None:
    run, requeued = tmp_path / "run", tmp_path / "commands" / "requeued"
    arguments = (str(recipe_file), str(run), "schedule.steps=300", "checkpoint.every=1000", "log.every=1")
    process = start(tmp_path, *arguments)
    until = time.monotonic() + 240
    while not ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and requeued.exists(), output
    assert len(list((run / "checkpoints").glob("step-*"))) == 1 and not (run / "model").exists()
    requeued.unlink()
    process = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "going on from step" in output, output
    assert (run / "model").is_dir() and not requeued.exists()
