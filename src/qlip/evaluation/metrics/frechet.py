"""Frechet distance between two sets of images over the features of a named network.

Shapes: N images, D features each.

Two Gaussians with the means and covariances of both sets' features are |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
apart (Dowson and Landau, 1982; over features of images: arXiv 1706.08500). The number depends on the network, so it
carries that network's name; FID is the one over the Inception network of 2015-12-05 and no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import GROUPS, Jackknife, jackknife_sets
from qlip.runtime.finite import require_finite


class Moments:
    """Mean and covariance of features that come in batches, float64, in one pass; parts may be merged in any order.

    Args:
        dimensions: D.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    @classmethod
    def given(cls, count: int, mean: Tensor, covariance: Tensor) -> Moments:
        """Make moments from stored ones: mean (D,) and unbiased covariance (D, D), float64."""
        found = cls(len(mean))
        found.count, found.mean, found._scatter = count, mean, covariance * (count - 1)
        return found

    def add(self, features: Tensor) -> None:
        """Count a batch.

        Args:
            features: (B, D), any float type; B may be 0.

        Raises:
            QLIPError: another number of features, or some that are no finite numbers.
        """
        dimensions = len(self.mean)
        if features.dim() != 2 or features.shape[1] != dimensions:
            raise QLIPError(f"features must be (B, {dimensions}) like those before, got {tuple(features.shape)}")
        if not len(features):
            return
        batch = Moments(dimensions)
        rows = features.detach().to("cpu", torch.float64)
        require_finite(rows, "features", "the network, or the model, is broken")
        batch.count, batch.mean = len(rows), rows.mean(0)
        centred = rows - batch.mean
        batch._scatter = centred.t() @ centred
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Take in what another one counted (Chan, Golub and LeVeque, 1983): nothing is lost to large means."""
        if other.mean.shape != self.mean.shape:
            raise QLIPError(f"moments of {len(other.mean)} features do not go with those of {len(self.mean)}")
        total = self.count + other.count
        if not other.count:
            return
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / total)
        between = torch.outer(difference, difference) * (self.count * other.count / total)
        self._scatter = self._scatter + other._scatter + between
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased.

        Raises:
            QLIPError: fewer than two rows were counted.
        """
        if self.count < 2:
            raise QLIPError(f"a covariance needs two images or more, got {self.count}")
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Frechet:
    """A distance and a caveat.

    Attributes:
        distance: in squared units of the features, at least 0.
        warning: why the number is not to be trusted, or None.
    """

    distance: float
    warning: str | None


def frechet_distance(first: Moments, second: Moments) -> Frechet:
    """The distance of two Gaussians with these moments.

    tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2), both roots symmetric. Unlike a root of the
    product it stays real, and exact to rounding, where covariances are singular.

    Raises:
        QLIPError: not the same number of features, or fewer than two rows.
    """
    if first.mean.shape != second.mean.shape:
        raise QLIPError(f"sets of {len(first.mean)} and {len(second.mean)} features have no distance")
    covariances = first.covariance, second.covariance
    shared = torch.linalg.svdvals(_root(covariances[0]) @ _root(covariances[1])).sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * shared
    distance = float((first.mean - second.mean).square().sum() + spread)
    count, dimensions = min(first.count, second.count), len(first.mean)
    warning = None
    if count <= dimensions:
        warning = f"{count} images for {dimensions} features: the covariance is singular and the distance biased"
    return Frechet(max(0.0, distance), warning)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    return root


def frechet_jackknife(first: Tensor, second: Tensor, paired: bool, shares: tuple[float, float]) -> Jackknife:
    """Estimate standard error and expected bias of a distance; see :func:`jackknife_sets`.

    Args:
        first, second: (N, D) and (M, D) features, at least two images outside of every group.
    """
    sets = first.double(), second.double()

    def distance(*left_out: int | None) -> float:
        kept = [one if out is None else one[_outside(len(one), out)] for one, out in zip(sets, left_out, strict=True)]
        difference = kept[0].mean(0) - kept[1].mean(0)
        factors = [_factor(one) for one in kept]
        spread = sum(float(one.square().sum()) for one in factors)
        return (
            float(difference.square().sum())
            + spread
            - 2 * float(torch.linalg.svdvals(factors[0] @ factors[1].t()).sum())
        )

    return jackknife_sets(distance, paired, shares)


def _outside(count: int, group: int) -> Tensor:
    return torch.arange(count) % GROUPS != group


def _factor(features: Tensor) -> Tensor:
    """Matrix F of min(N, D) rows with F' F the unbiased covariance of features (N, D)."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    factor: Tensor = centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R
    return factor
