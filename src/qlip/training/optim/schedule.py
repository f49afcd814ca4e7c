"""Learning rate schedule of a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak learning rate: linear warm-up, then half a cosine down to ``floor``.

    Args:
        step: 0 for the first step.
        steps: number of steps of the whole run.
        warmup: number of warm-up steps; the first step has the factor 1 / warmup.
        floor: final factor, as a fraction of the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
