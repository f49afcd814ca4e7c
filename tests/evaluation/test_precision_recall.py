"""Precision and recall against a slow literal twin and cases that can be seen; memory does not depend on the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlip import QLIPError
from qlip.evaluation.metrics import precision_recall as manifold
from qlip.evaluation.metrics.precision_recall import precision_recall, radii


def rows(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def twin(real: Tensor, others: Tensor, neighbours: int) -> tuple[list[bool], list[bool]]:
    def distance(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y.double()).square().sum())

    def radius(of: int, points: Tensor) -> float:
        return sorted(distance(points[of], one) for at, one in enumerate(points) if at != of)[neighbours - 1]

    def inside(point: Tensor, points: Tensor) -> bool:
        return any(distance(point, one) <= radius(at, points) for at, one in enumerate(points))

    return [inside(one, real) for one in others], [inside(one, others) for one in real]


@pytest.mark.parametrize("block", [4, 7, 1000])
def test_precision_recall__against_a_literal_twin(block: int) -> None:
    real, others = rows(23, 3, 0), rows(17, 3, 1, 1.5)
    found = precision_recall(real, others, neighbours=3, block=block)
    precise, recalled = twin(real, others, 3)
    assert found.precise.tolist() == precise and found.recalled.tolist() == recalled
    assert 0 < sum(precise) < 17 and 0 < sum(recalled) < 23


def test_precision_recall__what_fills_a_part_is_precise_and_not_recalled() -> None:
    left, right = rows(60, 2, 2), rows(60, 2, 3, 50.0)
    found = precision_recall(torch.cat([left, right]), rows(60, 2, 4))
    assert found.precise.double().mean() > 0.9 and 0.3 < found.recalled.double().mean() <= 0.5
    same = precision_recall(left, left.clone())
    assert same.precise.all() and same.recalled.all()
    apart = precision_recall(left, right)
    assert not apart.precise.any() and not apart.recalled.any()


def test_precision_recall__twins_in_a_set_are_neighbours_and_large_features_are_exact() -> None:
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0], [7.0]]) + 4096.0
    assert radii(points, 1).tolist() == [0.0, 0.0, 1.0, 4.0, 16.0]
    assert radii(points, 2).tolist() == [1.0, 1.0, 1.0, 9.0, 36.0]


def test_precision_recall__no_more_than_a_block_of_distances_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, squared = [0], manifold._squared

    def counted(first: Tensor, second: Tensor) -> Tensor:
        found = squared(first, second)
        largest[0] = max(largest[0], found.numel())
        return found

    monkeypatch.setattr(manifold, "_squared", counted)
    precision_recall(rows(100, 2, 0), rows(90, 2, 1), block=16)
    assert largest[0] == 16 * 16


def test_precision_recall__sets_that_are_too_small() -> None:
    with pytest.raises(QLIPError, match="needs 4 images or more of each set, got 3 and 9"):
        precision_recall(rows(3, 2, 0), rows(9, 2, 0))
