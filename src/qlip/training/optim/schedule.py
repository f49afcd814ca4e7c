"""Learning rates over a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak learning rate: linear warm-up, then half a cosine down to ``floor``.

    Args:
        step: 0 for the first step.
        steps: of the whole run.
        warmup: steps until the peak; the first step already moves, at 1 / warmup.
        floor: what the last step approaches, as a share of the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
