"""Description of the machine, versions of packages, and peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch


def describe_machine(device: torch.device | None = None) -> str:
    """Return processor, cores, threads, GPU, system and PyTorch version in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    parts = [processor, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if device is not None and device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, platform.system(), f"PyTorch {torch.__version__}"])


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of installed packages by name; None for a package that is not installed."""
    return {name: _version(name) for name in packages}


def reset_peak_memory(device: torch.device) -> bool:
    """Restart the measurement of peak memory.

    Returns:
        False if the system only knows the process's peak since its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, was_reset: bool = False) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, else of this process, interpreter included.

    Args:
        device: whose memory is measured.
        was_reset: what `reset_peak_memory` returned; False measures since the start of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if was_reset and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
