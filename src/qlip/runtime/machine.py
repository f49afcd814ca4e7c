"""The machine: its description, its memory, its devices, its signals, versions of packages, forked children.

Linux, macOS and Windows differ in what they offer; code that needs a signal, a lock or a count that one of them lacks
asks here or in :mod:`qlip.files`.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from qlip.errors import QLIPError, nearest

STOP_SIGNALS = tuple(
    signal.Signals(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
"""Signals that ask a run to save and stop: Ctrl-C, a scheduler's SIGTERM, SLURM's notice (none on Windows)."""


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types that weights can have in memory, by name."""


def describe_machine(device: torch.device | None = None) -> str:
    """Return processor, cores, threads, GPU, system and PyTorch version in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1]
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
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
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device, was_reset: bool = False) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, else of this process, interpreter included; 0 if unknown.

    Args:
        device: whose memory is measured.
        was_reset: what `reset_peak_memory` returned; False measures since the start of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if was_reset and status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory() -> int | None:
    """Return the machine's memory in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether oneDNN multiplies bfloat16 on a CPU; True for other devices, and without oneDNN.

    With AVX2 alone it does not, and products take many times as long as in float32.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def survive_fork() -> None:
    """Let forked children of this process compute, with one thread; called when a model is loaded.

    Loading starts the threads of GNU OpenMP. A forked child has none of them and would wait for them forever at its
    first product, as in ``datasets.map(num_proc=2)``.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is a GPU where there is one.

    Raises:
        QLIPError: this machine has no such device.
    """
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
    if name == "auto":
        return torch.device(present[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in present:
        raise QLIPError(f"device {name}: this machine has {', '.join(present)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QLIPError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        QLIPError: not a dtype that weights can have.
    """
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise QLIPError(f"dtype {name}: no such type of weights{nearest(name, DTYPES)}; take {', '.join(DTYPES)}")
    return DTYPES[name]
