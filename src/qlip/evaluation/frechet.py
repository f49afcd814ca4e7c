"""How far the pictures of one set are from those of another, as a set: a Frechet distance over a named network.

Shapes: N pictures, D features each.

Two Gaussians with the means and covariances of both sets' features are |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
apart (Dowson and Landau, 1982; over features of pictures: arXiv 1706.08500). The number depends on the network, so it
carries that network's name; FID is the one over an Inception network that none of this reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.evaluation.lpips import LPIPS


class Moments:
    """Mean and covariance of features that come in batches, float64, in one pass; parts may be merged in any order.

    Args:
        dimensions: D.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Count a batch.

        Args:
            features: (B, D), any float type; B may be 0.

        Raises:
            QLIPError: another number of features.
        """
        dimensions = len(self.mean)
        if features.dim() != 2 or features.shape[1] != dimensions:
            raise QLIPError(f"features must be (B, {dimensions}) like those before, got {tuple(features.shape)}")
        if not len(features):
            return
        batch = Moments(dimensions)
        rows = features.detach().to("cpu", torch.float64)
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
            raise QLIPError(f"a covariance needs two pictures or more, got {self.count}")
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Frechet:
    """A distance and what to keep in mind about it.

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
        warning = f"{count} pictures for {dimensions} features: the covariance is singular and the distance biased"
    return Frechet(max(0.0, distance), warning)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    return root


class VGG16Features(nn.Module):
    """Features of `fd_vgg16`: LPIPS' VGG16 after its last convolution (relu5_3), averaged over places.

    Args:
        network: ``LPIPS.from_cache("vgg")``; it is shared, not copied.

    Raises:
        QLIPError: it is not of VGG16.
    """

    name = "fd_vgg16"

    def __init__(self, network: LPIPS) -> None:
        super().__init__()
        if network.net != "vgg":
            raise QLIPError(f"{self.name} is over LPIPS' network vgg, got {network.net!r}")
        self.network = network
        last = network.features[-1]
        assert isinstance(last, nn.Conv2d)
        self._last, self.dimensions = last, last.out_channels

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Yields a list that takes the features of each batch which LPIPS looks at inside: one pass serves both."""
        heard: list[Tensor] = []

        def take(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            del module, given
            heard.append(F.relu(result.detach()).mean((2, 3)))

        hook = self._last.register_forward_hook(take)
        try:
            yield heard
        finally:
            hook.remove()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures at their own size.

        Args:
            pictures: (B, 3, H, W) in [-1, 1], H and W at least 16.

        Returns:
            (B, 512) float32.
        """
        with self.listening() as heard:
            self.network.levels(pictures)
        (features,) = heard
        return features
