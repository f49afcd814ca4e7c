"""Precision and recall of a set of images (Kynkaanniemi et al., arXiv 1904.06991): how good, how varied.

Shapes: N real and M other images, D features.

A set is taken to fill the balls around its images that reach to each one's k-th nearest neighbour of the same set
(eq. 1). Precision is the share of others inside that of the real ones, recall the reverse (eq. 2). The paper looks at
features of VGG16's second full layer; the metrics depend on the network and carry its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.evaluation.metrics.kid import checked_pair

NEIGHBOURS = 3
BLOCK = 1024
"""Images at once: memory for distances is bounded by its square, however many there are."""


@dataclass(frozen=True)
class Coverage:
    """The images of each set that lie in the region filled by the other.

    Attributes:
        precise: (M,) bool, of the others.
        recalled: (N,) bool, of the real ones.
    """

    precise: Tensor
    recalled: Tensor


def precision_recall(real: Tensor, others: Tensor, *, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> Coverage:
    """Improved precision and recall, image by image; their means are the metrics.

    Args:
        real: (N, D).
        others: (M, D).
        neighbours: k.
        block: images of a set at once.

    Raises:
        QLIPError: not the same D, not more than k images of each, or features that are not finite.
    """
    checked_pair(real, others, neighbours + 1)
    return Coverage(
        _inside(others, real, radii(real, neighbours, block), block),
        _inside(real, others, radii(others, neighbours, block), block),
    )


def radii(features: Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> Tensor:
    """(N,) float64: each one's squared distance to its k-th nearest other one."""
    found = []
    for start, rows in _blocks(features, block):
        nearest = torch.full((len(rows), neighbours), torch.inf, dtype=torch.float64)
        for begin, columns in _blocks(features, block):
            distances = _squared(rows, columns)
            if start == begin:
                distances.fill_diagonal_(torch.inf)  # itself is no neighbour
            nearest = torch.cat([nearest, distances], 1).topk(neighbours, largest=False).values
        found.append(nearest.amax(1))
    return torch.cat(found)


def _inside(points: Tensor, centres: Tensor, squared_radii: Tensor, block: int) -> Tensor:
    """(P,) bool: a point is in one of the balls, its surface included."""
    found = []
    for _, rows in _blocks(points, block):
        inside = torch.zeros(len(rows), dtype=torch.bool)
        for begin, columns in _blocks(centres, block):
            inside |= (_squared(rows, columns) <= squared_radii[begin : begin + len(columns)]).any(1)
        found.append(inside)
    return torch.cat(found)


def _blocks(features: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(features), block):
        yield start, features[start : start + block].double()


def _squared(first: Tensor, second: Tensor) -> Tensor:
    """(A, D) and (B, D) float64 to (A, B) squared distances; float64, for they are differences of large numbers."""
    sizes = first.square().sum(1)[:, None] + second.square().sum(1)
    return (sizes - 2 * first @ second.t()).clamp_min_(0)
