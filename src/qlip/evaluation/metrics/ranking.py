"""Rank of the right class among all classes, and top-k accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlip.evaluation.evaluators.base import BROKEN, MetricValue, mean
from qlip.runtime.finite import require_finite


def ranks_of(scores: Tensor, targets: Tensor) -> Tensor:
    """(N,) int64: how many classes score higher than the right one, or as high and come earlier; 0 is right.

    A model that scores all classes alike therefore names everything as the first.

    Args:
        scores: (N, C).
        targets: (N,) int64 in [0, C).

    Raises:
        QLIPError: a score is not finite; nothing ranks above NaN.
    """
    require_finite(scores, "scores", BROKEN)
    own = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device)[None] < targets[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def accuracies(ranks: Tensor, among: Sequence[int] = (1, 5)) -> dict[str, MetricValue]:
    """``top1`` and so on in percent, with intervals: shares of ranks (N,) that are among the first so many."""
    return {f"top{k}": mean(ranks < k, unit="%", better="higher", scale=100) for k in among}
