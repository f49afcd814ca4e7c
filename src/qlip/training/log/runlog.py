"""The log of a run: a line a step group on the console, in ``log.jsonl``, in TensorBoard and Weights & Biases."""

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
from qlip.training.log.loggers import JSONLines, Sink, TensorBoard, WeightsAndBiases


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
        wandb: a Weights & Biases project; None does without.
        name, config: of the run there: the recipe's name, and all of it.
        unit: plural noun of what the console counts per second.
        units_per_sample: mean number of them in a sample.
        flops: floating-point operations per sample, both passes, for the MFU.
        peak: floating-point operations per second of all ranks' devices together; None, for a device of unknown peak,
            leaves the MFU out.
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
        """One line: means of the window, then speed, waiting, memory, utilisation and time left.

        ``samples_per_s`` is over all ranks, without the time that hooks took; ``data_wait`` (share of the time) and
        ``peak_memory_gib`` are this rank's; ``mfu`` is the share of the devices' bfloat16 peak that the model's own
        operations take (arXiv 2204.02311, appendix B), whatever the precision.

        Args:
            step: steps taken.
            values: means over the window, and the learning rate.
            samples: consumed by the run so far, over all ranks.
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
        """Held-out figures of a set, as ``val/<set>/<name>``: a line of their own, of kind "validation"."""
        named = {f"val/{data}/{name}": value for name, value in values.items()}
        for sink in self._sinks:
            sink.numbers(step, "validation", None, named)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {step:>6}/{self.steps}  {data}: {terms}")

    def image(self, step: int, pixels: Tensor) -> None:
        """(3, H, W) in [0, 1], to where images go."""
        for sink in self._sinks:
            sink.picture(step, "originals above reconstructions", pixels)

    def close(self) -> None:
        """Flush and close."""
        for sink in self._sinks:
            sink.close()

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class SilentLog(RunLog):
    """Of a rank that leaves writing to the first."""

    silent = True

    def __init__(self) -> None:
        self.steps, self.console, self.clock = 0, Console(quiet=True), Clock()
        self.unit, self.units_per_sample = "samples", 1.0
        self._flops_to_peak = None
        self._sinks = []


@dataclass(frozen=True)
class Lap:
    """What a clock has counted: seconds of training, those of them spent waiting for data, steps and samples."""

    seconds: float
    waited: float
    steps: int
    samples: int


class Clock:
    """Time, and time spent waiting for data, since the last lap."""

    def __init__(self) -> None:
        self._start, self._waited, self._steps, self._samples = time.perf_counter(), 0.0, 0, 0
        self._all_steps, self._paused, self._paused_before = 0, 0.0, 0.0

    def step(self, waited: float, samples: int) -> None:
        """Count a step, with the samples of all ranks."""
        self._waited += waited
        self._steps += 1
        self._all_steps += 1
        self._samples += samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is no training: images, validation."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before

    def paused_a_step(self) -> float:
        """Mean seconds a step, since the start, of what is no training."""
        return self._paused / max(1, self._all_steps)

    def lap(self) -> Lap:
        """What was counted since the last lap."""
        now = time.perf_counter()
        seconds = now - self._start - (self._paused - self._paused_before)
        lap = Lap(max(seconds, 1e-9), self._waited, self._steps, self._samples)
        self._start, self._waited, self._steps, self._samples = now, 0.0, 0, 0
        self._paused_before = self._paused
        return lap


def _is_detail(name: str) -> bool:
    """Of what goes to files only: a line on the console should be read at a glance."""
    return name.startswith(("norm/", "cosine/", "factor/")) or name in ("bit_entropy_mean", "group_perplexity")


def _short(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
