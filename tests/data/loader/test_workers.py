"""Loader workers as processes: signals leave them at work until their parent has saved, and they die with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlip.data import Source, TrainingStream, TrainTransform, batches
from qlip.errors import QLIPError
from tests.data.samples import folder, tokenize

SCRIPT = """
import multiprocessing, os, signal, sys, time
import torch

if __name__ == "__mp_main__":  # a worker: the second is still starting when the signal comes
    try:
        os.close(os.open(sys.argv[1] + ".first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(2)

from qlip.data import FolderImages, Source, TrainingStream, TrainTransform, batches

def tokenize(texts):
    ids = torch.ones(len(texts), 4, dtype=torch.int64)
    return ids, ids

if __name__ == "__main__":
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stopped.append(True))
    stream = TrainingStream([Source(FolderImages(sys.argv[1]), TrainTransform((16, 16)))], 0, tokenize)
    iterator = batches(stream, 4, num_workers=2)
    next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    while not stopped:
        next(iterator)
    for _ in range(50):
        next(iterator)
    print("still served", flush=True)
"""


@pytest.fixture
def running(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that draws batches with two workers, and their ids."""
    folder(tmp_path / "images")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "images")]
    errors = (tmp_path / "stderr").open("w")  # a killed process's semaphores are mentioned there, and freed
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    errors.close()
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    return process, workers


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_the_end(pids: list[int], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(pid) for pid in pids):
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers__ignore_a_signal_that_the_parent_handles(
    running: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, workers = running
    os.killpg(process.pid, number)  # as a terminal, torchrun and SLURM do: to every process of the group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.strip() == "still served"
    assert wait_for_the_end(workers)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers__end_with_a_killed_parent(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = running
    process.kill()
    process.wait()
    assert wait_for_the_end(workers)


def test_round_robin_workers__killed_worker_is_an_error_in_one_line(tmp_path: Path) -> None:
    """As the system's memory guard kills one."""
    stream = TrainingStream([Source(folder(tmp_path / "f"), TrainTransform((8, 8)))], 0, tokenize)
    before = set(multiprocessing.active_children())
    row = batches(stream, 4, num_workers=1, prefetch=1)
    next(row)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(QLIPError, match="data: a loader process ended .*: lower data.num_workers or data.prefetch"):
        for _ in range(10):
            next(row)
