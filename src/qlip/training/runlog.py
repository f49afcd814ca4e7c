"""The log of a run: a line a step group on the console, in ``log.jsonl`` and in TensorBoard."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qlip.errors import QLIPError, require
from qlip.files import write_text


@dataclass
class Window:
    """Sums of the reports since the last line; part of a checkpoint, so that a resumed run logs the same means."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, report: Mapping[str, Tensor | float]) -> None:
        """One step's values."""
        for name, value in report.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that had it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """For JSON, which keeps a float's every bit."""
        return {"sums": self.sums, "counts": self.counts}


class RunLog:
    """Where the lines go.

    Args:
        folder: of the run.
        step: the run goes on from here: lines of later steps, written before a kill, are dropped, so none comes twice.
        steps: of the whole run.
        tensorboard: also write ``tensorboard/``.
        console: for people.
    """

    silent = False

    def __init__(self, folder: Path, step: int, steps: int, tensorboard: bool, console: Console) -> None:
        self.path, self.steps, self.console = folder / "log.jsonl", steps, console
        self._drop_after(step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            board = require("torch.utils.tensorboard", extra="train")
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.clock = Clock()

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                if line and json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # a kill cut the line short; its step comes again
        write_text(self.path, "".join(kept))

    def write(self, step: int, values: dict[str, float], samples: int) -> None:
        """One line: means of the window, then speed, waiting, memory and time left.

        Args:
            step: steps taken.
            values: means over the window, and the learning rate.
            samples: consumed by the run so far.
        """
        seconds, waited, taken, seen = self.clock.lap()
        speed = {
            "samples_per_s": seen / seconds,
            "data_wait": waited / seconds,
            "peak_memory_gib": peak_memory() / 2**30,
            "seconds_left": (self.steps - step) * seconds / max(1, taken),
        }
        try:
            self._file.write(json.dumps({"step": step, "samples": samples} | values | speed) + "\n")
            self._file.flush()
        except OSError as error:
            raise QLIPError(f"{self.path}: cannot write ({error.strerror}); free the disk and start again") from None
        if self._board is not None:
            for name, value in (values | speed).items():
                self._board.add_scalar(name, value, step)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.console.print(
            f"step {step:>6}/{self.steps}  {terms}  | {speed['samples_per_s']:.0f} img/s"
            f"  wait {speed['data_wait']:.0%}  {speed['peak_memory_gib']:.2f} GiB"
            f"  left {_short(speed['seconds_left'])}",
            highlight=False,
            soft_wrap=True,
        )

    def picture(self, step: int, pixels: Tensor) -> None:
        """(3, H, W) in [0, 1] to TensorBoard."""
        if self._board is not None:
            self._board.add_image("originals above reconstructions", pixels, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class SilentLog(RunLog):
    """Of a rank that leaves writing to the first."""

    silent = True

    def __init__(self) -> None:
        self.clock, self.console = Clock(), Console(quiet=True)

    def write(self, step: int, values: dict[str, float], samples: int) -> None:
        """Nothing."""
        self.clock.lap()

    def picture(self, step: int, pixels: Tensor) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Clock:
    """Time, and time spent waiting for data, since the last lap."""

    def __init__(self) -> None:
        self._start, self._waited, self._steps, self._samples = time.perf_counter(), 0.0, 0, 0

    def step(self, waited: float, samples: int) -> None:
        """Count a step."""
        self._waited += waited
        self._steps += 1
        self._samples += samples

    def lap(self) -> tuple[float, float, int, int]:
        """Seconds, seconds waited, steps and samples since the last lap."""
        now = time.perf_counter()
        result = (max(now - self._start, 1e-9), self._waited, self._steps, self._samples)
        self._start, self._waited, self._steps, self._samples = now, 0.0, 0, 0
        return result


def peak_memory() -> int:
    """Most bytes this process has held: of the accelerator where there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
