"""Time and memory: interleaved rounds, medians, the machine's matrix-multiply rate, and peak memory."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qlip.runtime.machine import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def interleaved(work: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time functions in ``rounds`` rounds after a warm-up; each round runs every function once, in rotating order.

    So disturbances of the machine affect all of them equally.

    Returns:
        Seconds per round of each function.
    """
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            gc.collect()
            began = time.perf_counter()
            work[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def prepare(threads: int | None, tiny: bool) -> None:
    """Set the number of PyTorch threads, and warn if the machine is busy."""
    if threads:
        torch.set_num_threads(threads)
    if os.getloadavg()[0] > 0.5 and not tiny:
        print(f"warning: load average {os.getloadavg()[0]:.1f}; close other programs", file=sys.stderr)


def matmul_rate(side: int = 2048, repeats: int = 3) -> float:
    """Measure fp32 operations per second of a square matrix product, the best of a few."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def peak_bytes(work: Callable[[], None]) -> int:
    """Measure the peak resident memory of this process while ``work`` runs, weights and interpreter included."""
    gc.collect()
    was_reset = reset_peak_memory(CPU)  # forget the peak of making the model
    work()
    return peak_memory(CPU, was_reset)


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def machine() -> str:
    """Describe processor, cores, threads, system and PyTorch in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()},"
        f" Python {platform.python_version()}, PyTorch {torch.__version__}, float32"
    )
