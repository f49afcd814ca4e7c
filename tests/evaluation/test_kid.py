"""Kernel distance against torchmetrics, a slow literal twin, and what is known of two equal distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlip import QLIPError
from qlip.evaluation.metrics.kid import kernel_distance, unbiased_mmd


def rows(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_kid__the_estimate_against_a_literal_twin() -> None:
    first, second = rows(7, 5, 0).double(), rows(6, 5, 1, 0.4).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / 5 + 1) ** 3

    own = [kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j]
    others = [kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j]
    between = [kernel(x, y) for x in first for y in second]
    expected = np.mean(own) + np.mean(others) - 2 * np.mean(between)
    assert unbiased_mmd(first, second) == pytest.approx(expected, rel=1e-10)


def test_kid__the_whole_sets_against_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.kid")
    first, second = rows(40, 6, 2), rows(40, 6, 3, 0.5)

    class Given(nn.Module):
        """Images that are features already."""

        num_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return x

    metric = image.KernelInceptionDistance(feature=Given(), subsets=1, subset_size=40)
    metric.update(first, real=True)
    metric.update(second, real=False)
    found = kernel_distance(first, second)
    assert (found.subsets, found.size, found.deviation) == (1, 40, 0.0)
    assert found.mean == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_kid__subsets_are_seeded_and_scatter_about_the_whole() -> None:
    first, second = rows(400, 8, 4), rows(300, 8, 5, 0.5)
    whole = unbiased_mmd(first.double(), second.double())
    found = kernel_distance(first, second, subsets=200, size=100)
    assert (found.subsets, found.size) == (200, 100)
    assert abs(found.mean - whole) < 4 * found.deviation / 200**0.5
    assert kernel_distance(first, second, subsets=200, size=100) == found
    assert kernel_distance(first, second, subsets=200, size=100, seed=1) != found
    same = kernel_distance(rows(400, 8, 6), rows(400, 8, 7), subsets=200, size=100)
    assert abs(same.mean) < same.deviation < found.mean  # unbiased: about 0 where nothing differs


def test_kid__sets_that_cannot_be_compared() -> None:
    with pytest.raises(QLIPError, match=r"sets of features \(9, 3\) and \(9, 4\) have no distance"):
        kernel_distance(rows(9, 3, 0), rows(9, 4, 0))
    with pytest.raises(QLIPError, match="needs 2 images or more of each set, got 1 and 9"):
        kernel_distance(rows(1, 3, 0), rows(9, 3, 0))
    with pytest.raises(QLIPError, match="features hold NaN; the network, or the model, is broken"):
        kernel_distance(rows(4, 3, 0).fill_(float("nan")), rows(9, 3, 0))
