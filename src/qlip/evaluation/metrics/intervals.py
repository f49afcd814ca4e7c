"""95% intervals of means, proportions and distances between sets, and of differences between two models.

Every function is plain NumPy; N is a number of images. `tests/evaluation/test_intervals.py` measures by simulation how
often each interval holds the true value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Interval = tuple[float | None, float | None]
FEW = 30
"""Below this number of images a mean has Student's interval: resampling so few gives bounds that are too narrow."""
Z = 1.959964
GROUPS = 10
"""Groups of a jackknife over sets of images."""
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
"""97.5% quantiles of Student's distribution with 1 to 29 degrees of freedom."""


def mean_interval(numbers: np.ndarray, seed: int = 0, resamples: int = 1000) -> Interval:
    """Return bounds of a mean: bootstrap percentiles over images, or Student's interval for fewer than 30 images.

    Args:
        numbers: (N,), one per image; None is returned for fewer than two, or if one is infinite.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    count = len(numbers)
    if count < 2 or not np.isfinite(numbers).all():
        return None, None
    if count < FEW:
        half = _T[count - 2] * float(numbers.std(ddof=1)) / count**0.5
        return float(numbers.mean()) - half, float(numbers.mean()) + half
    draw, means = np.random.default_rng(seed), np.empty(resamples)
    per_turn = max(1, 4_000_000 // count)
    for start in range(0, resamples, per_turn):
        stop = min(resamples, start + per_turn)
        means[start:stop] = numbers[draw.integers(0, count, (stop - start, count))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def proportion_interval(hits: np.ndarray, sizes: np.ndarray | None = None) -> Interval:
    """Return Wilson's bounds (1927) of the share sum(hits) / sum(sizes), which lie in [0, 1].

    Args:
        hits: (N,) successes of each image.
        sizes: (N,) trials of each image, such as its captions; 1 by default. Trials of one image depend on each other,
            so their number is divided by the design effect (Rao and Scott, 1992), at least 1.
    """
    count = len(hits)
    if count < 2:
        return None, None
    sizes = np.ones(count) if sizes is None else sizes
    trials = float(sizes.sum())
    share = float(hits.sum()) / trials
    effect = trials / count  # as if the trials of an image always agreed
    if 0 < share < 1:
        variance = float(((hits - share * sizes) ** 2).sum()) / trials**2
        effect = max(1.0, variance * trials / (share * (1 - share)))
    trials /= effect
    middle = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * (share * (1 - share) / trials + Z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


class Paired(NamedTuple):
    """Mean difference of two models over the images that both have a finite value for, and its interval."""

    difference: float
    low: float
    high: float
    images: int


def paired_difference(first: np.ndarray, second: np.ndarray) -> Paired | None:
    """Compare two models image by image: mean of first minus second; None if fewer than two images are comparable.

    Hits and misses have Bonett and Price's adjusted interval (2012), other values that of :func:`mean_interval`.

    Args:
        first, second: (N,) values of the same images in the same order; images with an infinite value are left out.
    """
    with np.errstate(invalid="ignore"):
        differences = (first - second)[np.isfinite(first) & np.isfinite(second)]
    count = len(differences)
    if count < 2:
        return None
    mean = float(differences.mean())
    if len(top := np.unique(np.abs(np.concatenate((first, second))))) <= 2 and top[0] == 0:
        scale = float(top[-1])  # 1, or 100 for percent
        wins, losses = (float(((sign * differences) > 0).sum() + 1) / (count + 2) for sign in (1, -1))
        half = Z * ((wins + losses - (wins - losses) ** 2) / (count + 2)) ** 0.5
        return Paired(mean, scale * (wins - losses - half), scale * (wins - losses + half), count)
    low, high = mean_interval(differences)
    assert low is not None and high is not None
    return Paired(mean, low, high, count)


class Jackknife(NamedTuple):
    """Standard error and expected bias of a metric of a set of images."""

    error: float
    bias: float

    def interval(self, value: float) -> tuple[float, float]:
        """Return Student's bounds of the metric at this number of images; the bias is not taken off."""
        half = _T[GROUPS - 2] * self.error
        return value - half, value + half


def jackknife(value: float, without: Sequence[float], share: float = 1.0) -> Jackknife:
    """Estimate error and bias from the values without one of G groups of images (Quenouille, 1956; Tukey, 1958).

    Args:
        value: over all images.
        without: G values, each over the images outside of one group.
        share: images that these are over, of all that the metric is over: both estimates fall with their number.
    """
    count, values = len(without), np.asarray(without)
    variance = (count - 1) / count * float(((values - values.mean()) ** 2).sum())
    return Jackknife((share * variance) ** 0.5, share * (count - 1) * (float(values.mean()) - value))


def jackknife_sets(
    distance: Callable[[int | None, int | None], float], paired: bool, shares: tuple[float, float] = (1.0, 1.0)
) -> Jackknife:
    """Estimate error and bias of a distance between two sets, each of `GROUPS` groups: image i is in i mod GROUPS.

    Args:
        distance: without a group of the first set and a group of the second; None leaves nothing out.
        paired: both sets are of the same images in the same order, which are left out together.
        shares: of each set, see :func:`jackknife`.
    """
    value = distance(None, None)
    if paired:
        return jackknife(value, [distance(one, one) for one in range(GROUPS)], shares[0])
    first = jackknife(value, [distance(one, None) for one in range(GROUPS)], shares[0])
    second = jackknife(value, [distance(None, one) for one in range(GROUPS)], shares[1])
    return Jackknife(math.hypot(first.error, second.error), first.bias + second.bias)
