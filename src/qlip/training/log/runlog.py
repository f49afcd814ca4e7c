"""Log of a run: one line per logging interval, on the console, in ``log.jsonl``, TensorBoard and Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qlip.runtime.machine import peak_memory
from qlip.runtime.progress import print_line
from qlip.training.log.loggers import JSONLines, Sink, TensorBoard, WeightsAndBiases


@dataclass
class Window:
    """Sums of reported values since the last logged line; checkpointed, so that a resumed run logs the same means."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, report: Mapping[str, Tensor | float]) -> None:
        """Add the values of one step."""
        for name, value in report.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that reported it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """State as a JSON object; JSON preserves floats exactly."""
        return {"sums": self.sums, "counts": self.counts}


class RunLog:
    """Writes logged values to the console and to all configured sinks.

    Args:
        folder: folder of the run.
        step: step to resume from; lines of later steps, written before the run was killed, are dropped as duplicates.
        steps: number of steps of the whole run.
        tensorboard: also write ``tensorboard/``.
        console: console to print on.
        wandb: name of a Weights & Biases project; None disables it.
        name, config: name and resolved recipe of the run, shown at Weights & Biases.
        unit: plural noun for the throughput on the console, e.g. "tokens".
        units_per_sample: mean number of units per sample.
        flops: FLOPs per sample, forward and backward, for the MFU; None omits the MFU.
        peak: peak FLOPs per second summed over the devices of all ranks; None (unknown device) omits the MFU.
    """

    silent = False

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        tensorboard: bool,
        console: Console,
        *,
        wandb: str | None = None,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        unit: str = "samples",
        units_per_sample: float = 1.0,
        flops: float | None = None,
        peak: float | None = None,
    ) -> None:
        self.steps, self.console, self.clock = steps, console, Clock()
        self.unit, self.units_per_sample = unit, units_per_sample
        self._flops_to_peak = None if flops is None or peak is None else flops / peak
        self._sinks: list[Sink] = [JSONLines(folder / "log.jsonl", step)]
        if tensorboard:
            self._sinks.append(TensorBoard(folder, step))
        if wandb is not None:
            self._sinks.append(WeightsAndBiases(folder, wandb, name, config or {}, self._say))

    def write(self, step: int, values: dict[str, float], samples: int) -> None:
        """Log one line: means of the window, then throughput, data wait, memory, MFU and time left.

        ``samples_per_s`` is over all ranks and excludes paused time; ``data_wait`` (fraction of the time) and
        ``peak_memory_gib`` are of this rank; ``mfu`` is the model's FLOPs per second as a fraction of the devices'
        bfloat16 peak (arXiv 2204.02311, appendix B), at any precision.

        Args:
            step: number of steps taken.
            values: means over the window, and the learning rate.
            samples: number of samples consumed so far, over all ranks.
        """
        lap = self.clock.lap()
        speed = {
            "samples_per_s": lap.samples / lap.seconds,
            "data_wait": lap.waited / lap.seconds,
            "peak_memory_gib": peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 2**30,
            "seconds_left": (self.steps - step) * (lap.seconds / max(1, lap.steps) + self.clock.paused_a_step()),
        }
        if self._flops_to_peak is not None:
            speed["mfu"] = speed["samples_per_s"] * self._flops_to_peak
        shown_speed = speed["samples_per_s"] * self.units_per_sample
        if self.units_per_sample != 1.0:
            speed[f"{self.unit}_per_s"] = shown_speed
        for sink in self._sinks:
            sink.numbers(step, "training", samples, values | speed)
        shown = {name: value for name, value in values.items() if not _is_detail(name)}
        terms = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        used = f"  mfu {speed['mfu']:.0%}" if "mfu" in speed else ""
        self._say(
            f"step {step:>6}/{self.steps}  {terms}  | {shown_speed:.0f} {self.unit}/s{used}"
            f"  wait {speed['data_wait']:.0%}  {speed['peak_memory_gib']:.2f} GiB"
            f"  left {_short(speed['seconds_left'])}"
        )

    def validation(self, step: int, data: str, values: Mapping[str, float]) -> None:
        """Log the metrics of a validation set as ``val/<set>/<name>``, in a line of kind "validation"."""
        named = {f"val/{data}/{name}": value for name, value in values.items()}
        for sink in self._sinks:
            sink.numbers(step, "validation", None, named)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {step:>6}/{self.steps}  {data}: {terms}")

    def image(self, step: int, pixels: Tensor) -> None:
        """Log an image of originals above reconstructions, (3, H, W) in [0, 1]."""
        for sink in self._sinks:
            sink.image(step, "originals above reconstructions", pixels)

    def close(self) -> None:
        """Flush and close all sinks."""
        for sink in self._sinks:
            sink.close()

    def _say(self, line: str) -> None:
        print_line(self.console, line)


class SilentLog(RunLog):
    """Log of a non-zero rank; writes nothing."""

    silent = True

    def __init__(self) -> None:
        self.steps, self.console, self.clock = 0, Console(quiet=True), Clock()
        self.unit, self.units_per_sample = "samples", 1.0
        self._flops_to_peak = None
        self._sinks = []


@dataclass(frozen=True)
class Lap:
    """Counts of a clock's lap: seconds of training, seconds of it spent waiting for data, steps and samples."""

    seconds: float
    waited: float
    steps: int
    samples: int


class Clock:
    """Measures training time, and time spent waiting for data, in laps."""

    def __init__(self) -> None:
        self._start, self._waited, self._steps, self._samples = time.perf_counter(), 0.0, 0, 0
        self._all_steps, self._paused, self._paused_before = 0, 0.0, 0.0

    def step(self, waited: float, samples: int) -> None:
        """Count a step: seconds waited for data, and samples over all ranks."""
        self._waited += waited
        self._steps += 1
        self._all_steps += 1
        self._samples += samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context excluded from training time: images, validation."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before

    def paused_a_step(self) -> float:
        """Mean paused seconds per step since the start."""
        return self._paused / max(1, self._all_steps)

    def lap(self) -> Lap:
        """Return the counts since the last lap and start a new one."""
        now = time.perf_counter()
        seconds = now - self._start - (self._paused - self._paused_before)
        lap = Lap(max(seconds, 1e-9), self._waited, self._steps, self._samples)
        self._start, self._waited, self._steps, self._samples = now, 0.0, 0, 0
        self._paused_before = self._paused
        return lap


def _is_detail(name: str) -> bool:
    """True for values logged to files but not to the console, whose lines stay short."""
    return name.startswith(("norm/", "cosine/", "factor/")) or name in ("bit_entropy_mean", "group_perplexity")


def _short(seconds: float) -> str:
    """Format a duration, e.g. "2h05m" or "3m20s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
