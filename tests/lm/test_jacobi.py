"""Speculative Jacobi decoding: the distribution of sampling one by one, in fewer passes of the model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm import jacobi


class Toy:
    """A model whose next id depends on the two before it and on the position; keeps its calls."""

    def __init__(self, values: int, sharpness: float, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.values = values
        logits = torch.randn(4, values + 1, values + 1, values, generator=random, dtype=torch.float64)
        self.table = (sharpness * logits).softmax(-1)  # position % 4, the id before the last, the last (V = none)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def row(self, ids: list[int]) -> Tensor:
        before, last = [self.values, self.values, *ids][-2:]
        return self.table[len(ids) % 4, before, last]

    def __call__(self, ids: Tensor, lengths: Tensor, draft: Tensor) -> Tensor:
        self.calls.append((lengths.clone(), draft.clone()))
        count, width = draft.shape
        padded = torch.cat([torch.full((count, 2), self.values), ids, torch.zeros(count, width + 1).long()], 1)
        columns = 2 + lengths[:, None] + torch.arange(width)
        padded = padded.scatter(1, columns, draft)
        columns = 2 + lengths[:, None] + torch.arange(width + 1)
        found = self.table[(columns - 2) % 4, padded.gather(1, columns - 2), padded.gather(1, columns - 1)]
        found[columns - 2 >= ids.shape[1]] = math.nan  # rows that must not be read
        return found


def chi_square(ids: Tensor, toy: Toy) -> tuple[float, int]:
    """Statistic of sequences (B, S) against the exact probabilities of all, and its degrees of freedom."""
    length, total, cells = ids.shape[1], 0.0, 0
    code = (ids * toy.values ** torch.arange(length).flip(0)).sum(1)
    seen = code.bincount(minlength=toy.values**length)
    for number, sequence in enumerate(itertools.product(range(toy.values), repeat=length)):
        expected = len(ids) * math.prod(float(toy.row(list(sequence[:i]))[sequence[i]]) for i in range(length))
        total, cells = total + (float(seen[number]) - expected) ** 2 / expected, cells + 1
    return total, cells - 1


def limit(freedom: int) -> float:
    """Value that chi-square exceeds with a probability of 1e-4 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(("values", "length", "window"), [(3, 4, 3), (4, 3, 2), (3, 4, 1), (3, 4, 0), (3, 4, 9)])
def test_decode__has_the_exact_distribution(values: int, length: int, window: int) -> None:
    toy = Toy(values, 1.0)
    ids, passes = jacobi.decode(toy, length, window, 0, range(8000))
    statistic, freedom = chi_square(ids, toy)
    assert statistic < limit(freedom)
    assert (passes == length).all() if window == 0 else passes.double().mean() < length - 0.2


def test_decode__a_wrong_rule_fails_the_test_of_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(3, 1.0)

    def from_p(found: Tensor, proposed: Tensor, draft: Tensor, noise: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        count, _ = verify(found, proposed, draft, noise, usable)
        return count, found[torch.arange(len(draft)), count]  # a refused id drawn from p, not from what p has above q

    verify = jacobi._verify
    monkeypatch.setattr(jacobi, "_verify", from_p)
    statistic, freedom = chi_square(jacobi.decode(toy, 4, 3, 0, range(8000))[0], toy)
    assert statistic > 2 * limit(freedom)


def test_decode__takes_fewer_passes_and_never_more() -> None:
    for sharpness, most in ((0.0, 0.1), (0.3, 0.25), (1.0, 0.55), (30.0, 0.9)):  # mean passes per id
        ids, passes = jacobi.decode(Toy(8, sharpness), 64, 16, 0, range(100))
        assert ids.shape == (100, 64) and int(passes.min()) >= 1 and int(passes.max()) <= 64
        assert float(passes.double().mean()) < most * 64


def test_decode__batch_equals_singles() -> None:
    toy = Toy(5, 1.0)
    ids, passes = jacobi.decode(toy, 20, 6, 3, range(12))
    for number in (11, 0, 5):
        one = jacobi.decode(toy, 20, 6, 3, [number])
        assert torch.equal(one[0][0], ids[number]) and one[1][0] == passes[number]
    assert not torch.equal(jacobi.decode(toy, 20, 6, 4, range(12))[0], ids)


def test_decode__never_draws_beyond_the_end_or_what_is_impossible() -> None:
    toy = Toy(4, 1.0)
    toy.table[..., 2] = 0.0  # as a filter leaves it
    toy.table /= toy.table.sum(-1, keepdim=True)
    ids, passes = jacobi.decode(toy, 9, 5, 0, [7])
    assert not (ids == 2).any() and int(passes) == len(toy.calls)
    for before, after in itertools.pairwise(toy.calls):
        assert 1 <= int(after[0] - before[0]) <= before[1].shape[1] + 1  # what a cache relies on
    assert all(int(lengths) + draft.shape[1] <= 8 for lengths, draft in toy.calls)
    assert toy.calls[0][1].shape == (1, 0)


def test_decode__of_certain_ids_follows_them() -> None:
    toy = Toy(4, 1.0)
    toy.table = torch.nn.functional.one_hot(toy.table.argmax(-1), 4).float()
    ids = jacobi.decode(toy, 12, 4, 0, [0])[0][0].tolist()
    assert all(int(toy.row(ids[:i]).argmax()) == ids[i] for i in range(12))


@pytest.mark.parametrize(("settings", "named"), [((0, 4, 0, [0]), "length"), ((4, -1, 0, [0]), "window")])
def test_decode__settings_out_of_range_are_named(settings: Any, named: str) -> None:
    with pytest.raises(QLIPError, match=named):
        jacobi.decode(Toy(2, 1.0), *settings)
