"""A tokenising process that is killed again and again, and goes on each time; run by test_runner.py.

This process imports everything once and computes nothing; each run is a fork of it, as a newly started command would
be. How far a run has come is written to a file, a byte an event, by which the moments of the kills are chosen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.tokenize.encoder import Encoder, describe
from qlip.archive.tokenize.inputs import find
from qlip.archive.tokenize.runner import Run, encode_here

INSIDE, BETWEEN = b"i", b"b"


def one_run(source: str, model: str, output: str, events: int) -> None:
    """As `qlip tokenize --workers 0` does."""
    import torch

    torch.set_num_threads(1)
    work = describe(model, Views(crops="flip"), batch_size=4, embeddings=True)
    run = Run(Layout(output), find(source), work)
    run.begin()
    run.write_parts(
        encode_here(run.todo, Encoder(work), work, 2),
        lambda rows, done: os.write(events, BETWEEN if done else INSIDE) and None,
    )


def forked(source: str, model: str, output: str, log: Path) -> int:
    """Start a run; its events go to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        one_run(source, model, output, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        code = 0
    finally:
        os._exit(code)


def killed_after(pid: int, log: Path, events: int, delay: float) -> str:
    """Kill a run a moment after an event; how the log then ends, or "" if the run was through before."""
    while True:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return ""
        if log.exists() and log.stat().st_size >= events:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return log.read_bytes()[-1:].decode()


def main(source: str, model: str, folder: str, kills: int, seed: int) -> None:
    """Undisturbed to `folder`/whole, killed to `folder`/killed; says how the kills fell."""
    rng, home = random.Random(seed), Path(folder)
    assert os.waitpid(forked(source, model, str(home / "whole"), home / "log"), 0)[1] == 0
    fell = []
    for number in range(kills):
        pid = forked(source, model, str(home / "killed"), log := home / f"log-{number}")
        fell.append(killed_after(pid, log, rng.randint(1, 18), rng.uniform(0, 0.004)))
    last = os.waitpid(forked(source, model, str(home / "killed"), home / "log-last"), 0)[1]
    print(json.dumps({"fell": fell, "last": last}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
