"""Throughput and peak memory of a model on a described machine; one row of a result.

`ThroughputBenchmark` is the evaluator, `measure_throughput` the function that times, `Throughput` what it returns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, MetricValue, PassResult, RunOnce
from qlip.evaluation.models.base import ENCODE_IMAGE, RECONSTRUCT, TOKENIZE, EvalModel, QLIPEvalModel
from qlip.evaluation.models.pairs import PairedFiles
from qlip.runtime.machine import describe_machine, peak_memory, reset_peak_memory

THROUGHPUT = "throughput"
NOISE = "noise"
"""The row's dataset: the images are random pixels."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Throughput:
    """Rates and peak memory.

    Attributes:
        rates: images per second of ``encode``, ``decode``, ``rebuild``, ``embed``, as far as the model has them;
            medians over rounds.
        ranges: rates of the slowest and the fastest round, by the same names.
        peak: bytes: peak of tensors on a GPU, else of the whole process, interpreter and weights included.
        batch_size, rounds: of the measurement.
        machine: processor, cores, threads, GPU, system, and PyTorch.
    """

    rates: dict[str, MetricValue]
    ranges: dict[str, tuple[float, float]]
    peak: int
    batch_size: int
    rounds: int
    machine: str

    def values(self) -> dict[str, MetricValue]:
        """Return the metrics of a result: ``encode_per_second`` and so on, and ``peak_gib``."""
        found = {f"{name}_per_second": rate for name, rate in self.rates.items()}
        found["peak_gib"] = MetricValue(self.peak / 2**30, count=self.batch_size, unit="GiB", better="lower")
        return found


class ThroughputBenchmark(RunOnce):
    """:func:`measure_throughput` as a row of a result, which belongs to no dataset and does not repeat exactly.

    Args:
        batch_size, rounds, warmup: arguments of :func:`measure_throughput`.
    """

    name: ClassVar[str] = THROUGHPUT
    repeatable: ClassVar[bool] = False

    def __init__(self, batch_size: int = 16, rounds: int = 5, warmup: int = 1) -> None:
        self.batch_size, self.rounds, self.warmup = batch_size, rounds, warmup

    def check(self, model: EvalModel) -> None:
        """Refuse a model that does nothing that could be timed. Raises QLIPError."""
        if isinstance(model, PairedFiles):
            raise QLIPError(f"{model.name}: is a list of files, which runs no model; there is nothing to time")
        if not model.capabilities & {TOKENIZE, RECONSTRUCT, ENCODE_IMAGE}:
            raise QLIPError(f"{model.name}: it neither reconstructs nor embeds images; there is nothing to time")

    def run(self, model: EvalModel, results: Sequence[PassResult]) -> tuple[dict[str, object], PassResult]:
        """Measure, and describe the machine."""
        del results
        found = measure_throughput(model, self.batch_size, self.rounds, self.warmup)
        rounds: list[dict[str, object]] = [
            {"work": name, "slowest": slowest, "fastest": fastest} for name, (slowest, fastest) in found.ranges.items()
        ]
        on_gpu = model.device.type == "cuda"
        whole = "of tensors on the GPU, at most" if on_gpu else "of the process, interpreter and weights included"
        metrics = MetricResult(found.values(), {"peak_gib": f"{whole}; {found.machine}"}, {"rounds": rounds})
        settings = {"batch_size": found.batch_size, "rounds": found.rounds, "machine": found.machine}
        return settings, PassResult({self.name: metrics}, found.batch_size, [], "")


@torch.inference_mode()
def measure_throughput(model: EvalModel, batch_size: int = 16, rounds: int = 5, warmup: int = 1) -> Throughput:
    """Time a model on noise of its input size; nothing else should run on the machine.

    Each round times all kinds of work in turn, so that other load on the machine affects them alike. Reading and
    preprocessing images is not included.

    Args:
        model: in eval mode.
        batch_size: images per batch.
        rounds: number of timed rounds.
        warmup: number of rounds before them.

    Raises:
        QLIPError: there is nothing to time, or a number is out of range.
    """
    if batch_size < 1 or rounds < 1 or warmup < 0:
        raise QLIPError(f"batch size and rounds must be positive, got {batch_size} and {rounds}; warm-up {warmup}")
    ThroughputBenchmark().check(model)
    height, width = model.preprocessing.size
    pixels = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))
    work = _work(model, model.preprocessing.normalize(pixels).to(model.device))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    was_reset = reset_peak_memory(model.device)
    for turn in range(warmup + rounds):
        for name, piece in work.items():
            took = _timed(piece, model.device)
            if turn >= warmup:
                seconds[name].append(took)
    rates = {name: _rate(batch_size, statistics.median(times)) for name, times in seconds.items()}
    ranges = {name: (batch_size / max(times), batch_size / min(times)) for name, times in seconds.items()}
    peak = peak_memory(model.device, was_reset)
    return Throughput(rates, ranges, peak, batch_size, rounds, describe_machine(model.device))


def _work(model: EvalModel, pixels: Tensor) -> dict[str, Work]:
    """Functions to time by name; decoding alone is known of a QLIP only."""
    work: dict[str, Work] = {}
    if TOKENIZE in model.capabilities:
        work["encode"] = lambda: model.tokenize(pixels)
    if isinstance(model, QLIPEvalModel):
        indices, grid, network = model.tokenize(pixels), model.model.grid_of(pixels), model.model
        work["decode"] = lambda: network.decode(indices, grid)
    if RECONSTRUCT in model.capabilities:
        work["rebuild"] = lambda: model.reconstruct(pixels)
    if ENCODE_IMAGE in model.capabilities:
        work["embed"] = lambda: model.encode_image(pixels)
    return work


def _timed(work: Work, device: torch.device) -> float:
    gc.collect()
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _rate(images: int, seconds: float) -> MetricValue:
    return MetricValue(images / seconds, count=images, unit="images/s", better="higher")
