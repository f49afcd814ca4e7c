"""How much memory was held at most: of a GPU what tensors took, else of the whole process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> bool:
    """Begin anew; False where the process's own peak since its start is all that can be had."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, forgotten: bool = False) -> int:
    """Bytes at most: that tensors took of a GPU, else resident memory of this process, interpreter included.

    Args:
        device: that computes.
        forgotten: what :func:`forget_peak` returned; without it the process's peak is since its start.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if forgotten and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
