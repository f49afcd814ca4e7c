"""A run in a process of its own that is killed."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path


def kill_at_first_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until a run has a checkpoint in its folder, and kill it by SIGKILL before it ends."""
    until = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*")) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
