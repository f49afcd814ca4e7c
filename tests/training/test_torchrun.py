"""`qlip train` under torchrun, from the outside: it ends whole, it stops when it is told to, and it never hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlip import QLIPModel

pytestmark = pytest.mark.slow
LONG = ("schedule.steps=100000", "checkpoint.every=100000", "log.every=1")
TORCHRUN = ("--standalone", "--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
RANKS = """
import os
from pathlib import Path
Path(os.environ["RANKS"], os.environ["RANK"]).write_text(str(os.getpid()))
{code}
from qlip.cli.main import main
if __name__ == "__main__":
    main()
"""


class Run:
    """torchrun, and the processes of its ranks."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def wait_for_steps(self, count: int) -> None:
        """Until so many lines are logged."""
        until = time.monotonic() + 240
        log = self.folder / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= count):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)

    def rank(self, number: int) -> int:
        """Its process id."""
        return int((self.folder.parent / "ranks" / str(number)).read_text())

    def end(self, seconds: float = 240) -> str:
        """What it said until its end."""
        output, _ = self.process.communicate(timeout=seconds)
        return output


@contextmanager
def torchrun(recipe: Path, folder: Path, *overrides: str, code: str = "") -> Iterator[Run]:
    """Two ranks of `qlip train`; `code` runs before it in each."""
    (folder.parent / "ranks").mkdir(exist_ok=True)
    script = folder.parent / "start.py"
    script.write_text(RANKS.format(code=code))
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, str(script), "train", str(recipe), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANKS": str(folder.parent / "ranks")}
    with subprocess.Popen(
        [*command, "-o", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield Run(process, folder)
        finally:
            process.kill()


def the_line(output: str) -> str:
    """The one line that qlip said itself, beside torchrun."""
    lines = [line for line in output.splitlines() if line.startswith("qlip: ")]
    assert len(lines) == 1, output
    return lines[0]


def test_a_run_ends_whole_and_one_rank_speaks(recipe_file: Path, tmp_path: Path) -> None:
    with torchrun(recipe_file, tmp_path / "run", "parallel.kind=fsdp", "log.images_every=12", "ema={}") as run:
        output = run.end()
    assert run.process.returncode == 0, output
    assert output.count("trained for 24 steps") == 1 and output.count("step     24/24") == 1
    assert "on 2 ranks" in output and "Warning" not in output
    QLIPModel.from_pretrained(tmp_path / "run/model")
    assert len(list((tmp_path / "run/pictures").iterdir())) == 2
    # and once more there is nothing to do
    with torchrun(recipe_file, tmp_path / "run", "parallel.kind=fsdp", "log.images_every=12", "ema={}") as run:
        assert run.end().count("trained for 24 steps") == 1


@pytest.mark.parametrize(("number", "to"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0), (signal.SIGUSR1, None)])
def test_a_signal_to_any_rank_saves_on_all(
    recipe_file: Path, tmp_path: Path, number: signal.Signals, to: int | None
) -> None:
    """SLURM's notice may reach one rank or torchrun itself."""
    with torchrun(recipe_file, tmp_path / "run", *LONG) as run:
        run.wait_for_steps(2)
        os.kill(run.process.pid if to is None else run.rank(to), number)
        output = run.end()
    assert run.process.returncode != 0
    assert output.count("run the same command to continue") == 1, output
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*")
    step = json.loads((saved / "training/state.json").read_text())["step"]
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step
    QLIPModel.from_pretrained(saved)


def test_a_killed_rank_ends_the_run_with_its_reason(recipe_file: Path, tmp_path: Path) -> None:
    with torchrun(recipe_file, tmp_path / "run", *LONG, "checkpoint.every=2") as run:
        run.wait_for_steps(5)
        os.kill(run.rank(1), signal.SIGKILL)
        began = time.monotonic()
        output = run.end()
    assert time.monotonic() - began < 60
    assert run.process.returncode != 0
    line = the_line(output)
    assert line.startswith("qlip: no answer from rank 1: killed, out of memory, or cut off")
    assert re.search(r"exitcode *: -9", output)
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert saved
    QLIPModel.from_pretrained(saved[-1])


FULL = """
from qlip.training.state import dcp_safetensors as storage
original, calls = storage.save_file, []
def full(tensors, path, *more):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 2:
        raise OSError(28, "No space left on device")
    original(tensors, path, *more)
storage.save_file = full
"""


def test_one_ranks_full_disk_stops_all_and_leaves_the_last_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    with torchrun(recipe_file, tmp_path / "run", *LONG, "checkpoint.every=2", "parallel.kind=fsdp", code=FULL) as run:
        output = run.end()
    line = the_line(output)
    assert re.search(
        r"step-00000004: cannot save \(No space left on device\); the last complete checkpoint is .*-00000002", line
    )
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


ONE_RANK = """
from qlip.training import trainer
original = trainer.Trainer._set_rates
def broken(self):
    if self.progress.step == 3 and os.environ["RANK"] == "1":
        {what}
    return original(self)
trainer.Trainer._set_rates = broken
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "from qlip.errors import QLIPError; raise QLIPError('the disk is gone; mount it')",
            "qlip: rank 1: the disk is",
        ),
        ("raise ZeroDivisionError('a fault of ours')", "ZeroDivisionError: a fault of ours"),
    ],
)
def test_a_rank_that_fails_alone_says_why_and_the_others_follow(
    recipe_file: Path, tmp_path: Path, what: str, said: str
) -> None:
    with torchrun(recipe_file, tmp_path / "run", *LONG, code=ONE_RANK.format(what=what)) as run:
        output = run.end()
    assert run.process.returncode != 0
    assert said in output
    assert "no answer from rank" not in output and output.count("qlip: ") <= 1, output
