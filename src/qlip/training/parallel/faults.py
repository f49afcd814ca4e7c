"""Faults of a long run: one-line reasons shared among ranks, and gradient spikes."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store

from qlip.errors import QLIPError
from qlip.training.recipe_schema import SpikeSection

_PEER_GONE = ("gloo", "connection closed", "connection reset", "broken pipe", "socket", "timed out", "nccl", "store")
"""Parts of PyTorch's error messages about an unresponsive rank; some are raised as a plain RuntimeError."""
_REASON, _REPORTED, _SPEAKER = "reason", "reported", "speaker"


class CollectiveError(QLIPError):
    """An error detected collectively: every rank raises it, rank 0 prints it."""


def is_about_a_peer(error: BaseException) -> bool:
    """True if an error only reports that another rank is unresponsive."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(fragment in text for fragment in _PEER_GONE)


def is_about_the_device(error: BaseException) -> bool:
    """True if an error comes from the accelerator: out of memory, or a device fault."""
    kinds = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))  # since PyTorch 2.8
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


class Reasons:
    """Shares the reason of a failure among ranks, in a store that outlives them (in torchrun's agent).

    Args:
        store: store shared by all ranks.
        rank: this rank.
        world: number of ranks.
        patience: seconds to wait for the reason of the rank that failed first.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: float = 3.0) -> None:
        self._store, self.rank, self.world, self.patience = store, rank, world, patience

    def give(self, reason: str) -> None:
        """Store the reason why this rank ends, unless another rank has already stored one."""
        self._store.compare_set(_REASON, "", reason)

    def explain_silence(self, error: BaseException) -> str | None:
        """Explain in one line why other ranks are unresponsive; None if another rank reports the reason.

        Args:
            error: the communication error on this rank.
        """
        try:
            self._store.set(f"{_REPORTED}/{self.rank}", "here")
            until = time.monotonic() + self.patience
            while time.monotonic() < until:
                if self._store.check([_REASON]):
                    return None  # printed by the rank that stored it
                time.sleep(0.05)
            if self._store.add(_SPEAKER, 1) > 1:
                return None
            silent = [rank for rank in range(self.world) if not self._store.check([f"{_REPORTED}/{rank}"])]
        except (RuntimeError, dist.DistError):
            return f"the rank that hosts the store of the run is gone ({_first_line(error)})"
        ranks = ", ".join(str(rank) for rank in silent) or "unknown"
        return f"no answer from rank {ranks}: killed, out of memory, or cut off ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Spikes:
    """Detects steps whose gradient norm is far above the running mean; its state is checkpointed.

    Args:
        settings: section of the recipe; None disables detection.
    """

    def __init__(self, settings: SpikeSection | None) -> None:
        self.settings = settings
        self._norms: dict[str, deque[float]] = {}
        self._skipped: dict[str, int] = {}

    def ratio(self, phase: str, norm: float) -> float | None:
        """Ratio of the norm to its running mean if it is a spike, else None."""
        if self.settings is None:
            return None
        norms = self._norms.get(phase, ())
        if len(norms) < self.settings.window:
            return None
        mean = sum(norms) / len(norms)
        return norm / mean if norm > self.settings.factor * mean else None

    def record(self, phase: str, norm: float, skipped: bool) -> int:
        """Record a step; return the number of consecutively skipped steps."""
        if self.settings is None:
            return 0
        if skipped:
            self._skipped[phase] = self._skipped.get(phase, 0) + 1
        else:
            self._norms.setdefault(phase, deque(maxlen=self.settings.window)).append(norm)
            self._skipped[phase] = 0
        return self._skipped[phase]

    def state(self) -> dict[str, Any]:
        """State as a JSON object."""
        return {"norms": {phase: list(norms) for phase, norms in self._norms.items()}, "skipped": dict(self._skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        if self.settings is None:
            return
        window = self.settings.window
        self._norms = {phase: deque(norms, maxlen=window) for phase, norms in state["norms"].items()}
        self._skipped = dict(state["skipped"])
