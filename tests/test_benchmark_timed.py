"""Trainings of a fixed CPU time: what counts, and when they end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from benchmarks import timed
from qlip.training.log.runlog import SilentLog


def test_curve__counts_training_alone_and_ends_at_the_last_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def measure() -> Sequence[float]:
        now[0] += 50.0
        return [3.0, 5.0]

    monkeypatch.setattr(timed.time, "process_time", lambda: now[0])
    curve = timed.Curve(torch.nn.Linear(1, 1), measure, 16, 64.0)
    with pytest.raises(timed.Spent):
        for step in range(1, 1000):
            now[0] += 0.5
            curve(step, SilentLog(), nullcontext)
    spent, samples, *values = zip(*curve.points, strict=True)
    assert len(spent) == timed.POINTS and [set(one) for one in values] == [{3.0}, {5.0}]
    assert spent[-1] == 64.0 and samples[-1] == 128 * 16 and spent[-3] == 32.0
