"""Record of the environment of a training run: command, packages, devices, git state."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qlip.files import write_text
from qlip.runtime.machine import package_versions
from qlip.runtime.ranks import world_size

PACKAGES = (
    "qlip",
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "pydantic",
    "tensorboard",
    "torchmetrics",
    "wandb",
)


def record_session(folder: Path) -> None:
    """Append one entry to ``sessions.json``: command, time, packages, devices, git state; call it on one rank only."""
    path = folder / "sessions.json"
    sessions: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    sessions.append(describe())
    write_text(path, json.dumps(sessions, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Command, time, packages, ranks, devices and git state as a JSON object; no environment variables."""
    return {
        "command": shlex.join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": package_versions(PACKAGES),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "ranks": world_size(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "git": _git(),
    }


def _devices() -> list[str]:
    """Names of the GPUs of this machine, or of its CPU if it has none."""
    if not torch.cuda.is_available():
        return [platform.processor() or platform.machine()]
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether it is clean; None if installed from a wheel."""
    here = Path(__file__).parent

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)
        return {"commit": ask("rev-parse", "HEAD"), "clean": not ask("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None
