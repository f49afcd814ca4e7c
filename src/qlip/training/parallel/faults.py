"""What goes wrong in a long run, and how every rank comes to know: reasons in one line, and spikes of the gradient."""

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
"""Of PyTorch's many messages about a rank that does not answer; some come as a plain RuntimeError."""
_REASON, _REPORTED, _SPEAKER = "reason", "reported", "speaker"


class CollectiveError(QLIPError):
    """A fault that all ranks found together: each raises it, and the first rank says it."""


def is_about_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _PEER_GONE)


def is_about_the_device(error: BaseException) -> bool:
    """Whether an error is an accelerator's: out of memory, or a fault of its own, whatever was asked of it."""
    kinds = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))  # PyTorch 2.8 has it
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


class Reasons:
    """Why ranks ended, in a store that outlives each of them (torchrun's agent holds it).

    Args:
        store: shared by all ranks.
        rank: this one.
        world: number of ranks.
        patience: seconds to wait for a word of the rank that began it.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: float = 3.0) -> None:
        self._store, self.rank, self.world, self.patience = store, rank, world, patience

    def give(self, reason: str) -> None:
        """Say why this rank ends; the first reason of all ranks stands."""
        self._store.compare_set(_REASON, "", reason)

    def explain_silence(self, error: BaseException) -> str | None:
        """Why the others fell silent, in one line; None where somebody else says so.

        Args:
            error: what this rank saw of it.
        """
        try:
            self._store.set(f"{_REPORTED}/{self.rank}", "here")
            until = time.monotonic() + self.patience
            while time.monotonic() < until:
                if self._store.check([_REASON]):
                    return None  # the rank that gave it prints it
                time.sleep(0.05)
            if self._store.add(_SPEAKER, 1) > 1:
                return None
            silent = [rank for rank in range(self.world) if not self._store.check([f"{_REPORTED}/{rank}"])]
        except (RuntimeError, dist.DistError):
            return f"the rank that held the run together is gone ({_first_line(error)})"
        ranks = ", ".join(str(rank) for rank in silent) or "unknown"
        return f"no answer from rank {ranks}: killed, out of memory, or cut off ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Spikes:
    """Finds steps whose gradient norm stands out from those before; part of a checkpoint.

    Args:
        settings: the recipe's; None finds none.
    """

    def __init__(self, settings: SpikeSection | None) -> None:
        self.settings = settings
        self._norms: dict[str, deque[float]] = {}
        self._skipped: dict[str, int] = {}

    def ratio(self, phase: str, norm: float) -> float | None:
        """The norm over its running mean where that makes it a spike, else None."""
        if self.settings is None:
            return None
        norms = self._norms.get(phase, ())
        if len(norms) < self.settings.window:
            return None
        mean = sum(norms) / len(norms)
        return norm / mean if norm > self.settings.factor * mean else None

    def record(self, phase: str, norm: float, skipped: bool) -> int:
        """Take note of a step; returns how many were skipped in a row."""
        if self.settings is None:
            return 0
        if skipped:
            self._skipped[phase] = self._skipped.get(phase, 0) + 1
        else:
            self._norms.setdefault(phase, deque(maxlen=self.settings.window)).append(norm)
            self._skipped[phase] = 0
        return self._skipped[phase]

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"norms": {phase: list(norms) for phase, norms in self._norms.items()}, "skipped": dict(self._skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Put :meth:`state` back."""
        if self.settings is None:
            return
        window = self.settings.window
        self._norms = {phase: deque(norms, maxlen=window) for phase, norms in state["norms"].items()}
        self._skipped = dict(state["skipped"])
