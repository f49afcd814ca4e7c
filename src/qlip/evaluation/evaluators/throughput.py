"""How many images a second, and how much memory: one row, on a machine that is named.

As a row of a result it is of no set of images, and what it says does not come out again: verifying leaves it out.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, MetricValue
from qlip.evaluation.models.base import ENCODE_IMAGE, RECONSTRUCT, TOKENIZE, EvalModel, QLIPEvalModel
from qlip.evaluation.models.pairs import PairedFiles
from qlip.runtime.machine import describe_machine, peak_memory, reset_peak_memory

THROUGHPUT = "throughput"
"""What the row is called; in place of an evaluator of images, with the settings of :func:`measure_throughput`."""
NOISE = "noise"
"""What it is of, where other rows name a set."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        rates: images a second by what is done: ``encode``, ``decode``, ``rebuild``, ``embed``; those the model can.
            Medians over rounds.
        ranges: of the slowest and the fastest round, by the same names.
        peak: bytes: of a GPU, what tensors took at most; else of the whole process, interpreter and weights included.
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
        """As figures of a result: ``encode_per_second`` and so on, and ``peak_gib``."""
        found = {f"{name}_per_second": rate for name, rate in self.rates.items()}
        found["peak_gib"] = MetricValue(self.peak / 2**30, count=self.batch_size, unit="GiB", better="lower")
        return found


def can_be_timed(model: EvalModel, settings: Mapping[str, object]) -> None:
    """Refuse, before anything is measured, a model that does nothing that could be timed, and unknown settings."""
    if unknown := sorted(set(settings) - {"batch_size", "rounds", "warmup"}):
        raise QLIPError(f"{THROUGHPUT}: has no setting {unknown[0]}; it takes batch_size, rounds, and warmup")
    if isinstance(model, PairedFiles):
        raise QLIPError(f"{model.name}: was rebuilt elsewhere, as its list of pairs says; there is nothing to time")
    if not model.capabilities & {TOKENIZE, RECONSTRUCT, ENCODE_IMAGE}:
        raise QLIPError(f"{model.name}: it neither rebuilds nor embeds pictures; there is nothing to time")


def timed(model: EvalModel, settings: Mapping[str, Any]) -> tuple[dict[str, object], MetricResult]:
    """Throughput as a row of a result: what it depends on, and what was found.

    Args:
        model: in eval mode.
        settings: of :func:`measure_throughput`, other than its defaults.

    Raises:
        QLIPError: as :func:`measure_throughput`.
    """
    found = measure_throughput(model, **settings)
    rounds: list[dict[str, object]] = [
        {"work": name, "slowest": slowest, "fastest": fastest} for name, (slowest, fastest) in found.ranges.items()
    ]
    on_gpu = model.device.type == "cuda"
    whole = "of tensors on the GPU, at most" if on_gpu else "of the process, interpreter and weights included"
    metric_result = MetricResult(found.values(), {"peak_gib": f"{whole}; {found.machine}"}, {"rounds": rounds})
    return {"batch_size": found.batch_size, "rounds": found.rounds, "machine": found.machine}, metric_result


@torch.inference_mode()
def measure_throughput(model: EvalModel, batch_size: int = 16, rounds: int = 5, warmup: int = 1) -> Throughput:
    """Time a model on noise of its size; nothing else should run on the machine.

    All kinds of work take turns, a round after the other, so that what else happens falls on all alike. Reading and
    preparing images is not in it.

    Args:
        model: in eval mode.
        batch_size: images at once.
        rounds: that are timed.
        warmup: rounds before them.

    Raises:
        QLIPError: nothing to time, or no rounds.
    """
    if batch_size < 1 or rounds < 1 or warmup < 0:
        raise QLIPError(f"batch size and rounds must be positive, got {batch_size} and {rounds}; warm-up {warmup}")
    can_be_timed(model, {})
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
    """What there is to time; decoding alone only where it can be asked for."""
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


def _rate(pictures: int, seconds: float) -> MetricValue:
    return MetricValue(pictures / seconds, count=pictures, unit="pictures/s", better="higher")
