"""Kernel distance between two sets of features (Binkowski et al., arXiv 1801.01401): KID where they are Inception's.

Shapes: N and M images, D features; subsets of m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import GROUPS, Jackknife, jackknife_sets
from qlip.runtime.finite import require_finite

SUBSETS, SUBSET_SIZE = 100, 1000
"""The usual number of subsets, and of images per subset."""


@dataclass(frozen=True)
class KernelDistance:
    """Mean and spread of the squared distance over subsets.

    Attributes:
        mean: of the squared distances; about 0 for sets of one distribution, and then as often below as above.
        deviation: of them, with N - 1 (0 for a single subset): how far one subset's may be off, not the mean's error.
        subsets, size: how many of how many images.
    """

    mean: float
    deviation: float
    subsets: int
    size: int


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """The squared maximum mean discrepancy of random subsets, drawn without replacement from each set on its own.

    Args:
        first: (N, D).
        second: (M, D).
        subsets: how many are drawn.
        size: m; all images of the smaller set where it has fewer.
        seed: of the drawing.

    Raises:
        QLIPError: not the same D, fewer than two images, or features that are not finite.
    """
    checked_pair(first, second, 2)
    size = min(size, len(first), len(second))
    if size == len(first) == len(second):
        subsets = 1  # there is only one
    draw, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        mine, others = (one[_some(draw, len(one), size)].double() for one in (first, second))
        found.append(unbiased_mmd(mine, others))
    spread = float(np.std(found, ddof=1)) if subsets > 1 else 0.0
    return KernelDistance(float(np.mean(found)), spread, subsets, size)


def unbiased_mmd(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the squared discrepancy under k(x, y) = (x.y / D + 1)^3 (section 4 there).

    Args:
        first: (m, D) float64.
        second: (n, D) float64.
    """
    m, n = len(first), len(second)
    own, others = _kernel(first, first), _kernel(second, second)
    within = (own.sum() - own.trace()) / (m * (m - 1)) + (others.sum() - others.trace()) / (n * (n - 1))
    return float(within - 2 * _kernel(first, second).mean())


def kernel_jackknife(first: Tensor, second: Tensor, paired: bool) -> Jackknife:
    """Estimate the standard error of the unbiased squared discrepancy of two sets; see :func:`jackknife_sets`.

    Args:
        first, second: (N, D) and (M, D) features, at least two images outside of every group.
    """
    sets = [[one[group::GROUPS].double() for group in range(GROUPS)] for one in (first, second)]

    def sums(own: list[Tensor], others: list[Tensor]) -> np.ndarray:
        found = np.empty((GROUPS, GROUPS))
        for row, column in np.ndindex(found.shape):
            kernel = _kernel(own[row], others[column])
            same = own is others and row == column
            found[row, column] = float(kernel.sum() - kernel.trace() if same else kernel.sum())
        return found

    pairs = {(a, b): sums(sets[a], sets[b]) for a, b in ((0, 0), (1, 1), (0, 1))}
    sizes = [np.array([len(group) for group in one]) for one in sets]

    def distance(*left_out: int | None) -> float:
        kept = [np.array([group != out for group in range(GROUPS)]) for out in left_out]
        m, n = (int(size[one].sum()) for size, one in zip(sizes, kept, strict=True))
        (own, others, between) = (float(one[np.ix_(kept[a], kept[b])].sum()) for (a, b), one in pairs.items())
        return own / (m * (m - 1)) + others / (n * (n - 1)) - 2 * between / (m * n)

    return jackknife_sets(distance, paired)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y / D + 1)^3 of all pairs, (m, n)."""
    base = x @ y.t() / x.shape[1] + 1
    return base * base * base  # a power of float64 costs more than the product


def _some(draw: np.random.Generator, count: int, size: int) -> Tensor:
    return torch.from_numpy(draw.choice(count, size, replace=False))


def checked_pair(first: Tensor, second: Tensor, least: int) -> None:
    """Refuse two sets of features that cannot be compared.

    Raises:
        QLIPError: no rows of the same number of features, fewer than ``least`` of them, or some that are not finite.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise QLIPError(f"sets of features {tuple(first.shape)} and {tuple(second.shape)} have no distance")
    if min(len(first), len(second)) < least:
        raise QLIPError(f"needs {least} images or more of each set, got {len(first)} and {len(second)}")
    for features in (first, second):
        require_finite(features, "features", "the network, or the model, is broken")
