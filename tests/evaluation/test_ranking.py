"""Ranks and accuracies: against scikit-learn, and where scores are equal."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from qlip.errors import QLIPError
from qlip.evaluation.metrics.ranking import accuracies, ranks_of


def test_ranking__accuracies_are_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(80, 9, generator=draw), torch.randint(9, (80,), generator=draw)
    ranks = ranks_of(scores, targets)
    order = scores.argsort(1, descending=True)
    assert torch.equal(order.gather(1, ranks[:, None])[:, 0], targets)
    found = accuracies(ranks, [1, 3, 5])
    for k in (1, 3, 5):
        expected = 100 * top_k_accuracy_score(targets, scores, k=k, labels=range(9))
        assert found[f"top{k}"].value == pytest.approx(expected)


def test_ranking__of_equal_scores_the_earlier_class_comes_first() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [-1.0, 0.0, 0.0]])
    assert ranks_of(scores, torch.tensor([0, 1, 2])).tolist() == [0, 1, 1]
    assert accuracies(ranks_of(torch.zeros(6, 3), torch.tensor([0, 1, 2] * 2)))["top1"].value == pytest.approx(100 / 3)


def test_ranking__a_score_that_is_not_finite_ranks_nowhere() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(QLIPError, match="row 1: scores hold"):
            ranks_of(torch.tensor([[0.5, 0.1], [0.5, bad]]), torch.tensor([0, 1]))
