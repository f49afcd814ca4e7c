"""The order of the stream: permutations are bijections, shares are exact, epochs hold every sample once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlip.data.order import BLOCK, Mixture, Permutation, apportion, generator, hash_int


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64))
def test_a_permutation_is_a_bijection(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


def test_permutations_of_a_large_range_stay_inside_and_differ_by_seed() -> None:
    size = 10**12 + 7
    first, second = Permutation(size, 1), Permutation(size, 2)
    places = [first(index) for index in range(2000)]
    assert len(set(places)) == 2000 and all(0 <= place < size for place in places)
    assert places != [second(index) for index in range(2000)]


def test_a_permutation_leaves_no_trace_of_the_order() -> None:
    """Neighbours end up as far apart as chance puts them: no correlation of place with index, steps of both signs."""
    size = 5000
    places = np.array([Permutation(size, "x")(index) for index in range(size)])
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.mean(np.diff(places) > 0) - 0.5) < 0.03


def test_every_place_is_equally_likely() -> None:
    """Over many seeds each of 6 samples comes first equally often (chi-square, 5 degrees, far beyond 0.1%)."""
    counts = Counter(Permutation(6, "seed", seed)(0) for seed in range(3000))
    assert sum((counts[place] - 500) ** 2 / 500 for place in range(6)) < 25


def test_the_order_is_pinned() -> None:
    """A run resumed after an update must find its order: these numbers may never change."""
    assert [Permutation(10, 0, "order", "a", 0)(index) for index in range(10)] == [
        7,
        9,
        6,
        5,
        3,
        4,
        1,
        8,
        2,
        0,
    ]
    mixture = Mixture(["a", "b"], [5, 7], [1, 2], seed=3)
    places = [mixture[position] for position in (0, 1, 2, 999, 1000, 123456)]
    assert [(place.source, place.epoch, place.index) for place in places] == [
        (1, 0, 1),
        (1, 0, 4),
        (1, 0, 5),
        (0, 66, 4),
        (1, 95, 2),
        (1, 11762, 0),
    ]
    assert hash_int("seed", 1) == 16897049564449903209500966758296726196
    assert generator(7, "sample").random() == 0.44783247514145463


def test_weights_are_exact_in_every_block() -> None:
    mixture = Mixture(["a", "b", "c"], [50, 60, 70], [0.5, 0.3, 0.2], seed=0)
    for block in range(3):
        counts = Counter(mixture[block * BLOCK + slot].source for slot in range(BLOCK))
        assert counts == {0: 500, 1: 300, 2: 200}


def test_shares_are_even_within_a_block_too() -> None:
    mixture = Mixture(["a", "b"], [50, 60], [1, 1], seed=0)
    first = Counter(mixture[position].source for position in range(BLOCK // 4))
    assert 90 < first[0] < 160


@pytest.mark.parametrize("weights", [[1.0], [1, 1e-9], [3, 1, 1], [1e6, 1, 1, 1], [1 / 3] * 3])
def test_apportioned_seats_add_up_and_leave_nobody_out(weights: list[float]) -> None:
    seats = apportion(weights, BLOCK)
    assert sum(seats) == BLOCK and min(seats) >= 1
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    assert all(abs(seat - share) <= max(1, len(weights)) for seat, share in zip(seats, exact, strict=True))


@pytest.mark.parametrize("sizes", [[37], [37, 450], [1, 5, 1300]])
def test_each_epoch_holds_every_sample_once(sizes: list[int]) -> None:
    mixture = Mixture([f"s{number}" for number in range(len(sizes))], sizes, [1.0 + n for n in range(len(sizes))], 5)
    seen: dict[tuple[int, int], Counter[int]] = {}
    for position in range(6 * BLOCK):
        place = mixture[position]
        seen.setdefault((place.source, place.epoch), Counter())[place.index] += 1
    for number in range(len(sizes)):  # dictionaries keep the order of first sight: one epoch after the other
        epochs = [epoch for source, epoch in seen if source == number]
        assert epochs == list(range(len(epochs)))
    for (source, epoch), counts in seen.items():
        owned = 6 * mixture.slots[source]
        assert max(counts.values()) == 1
        assert len(counts) == min(sizes[source], owned - epoch * sizes[source])


def test_epochs_differ_and_sources_do_not_share_an_order() -> None:
    mixture = Mixture(["a"], [100], [1], seed=0)
    first, second = ([mixture[position + 100 * epoch].index for position in range(100)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    other = Mixture(["b"], [100], [1], seed=0)
    assert first != [other[position].index for position in range(100)]


def test_reading_out_of_order_changes_nothing() -> None:
    straight, jumping = (Mixture(["a", "b"], [30, 40], [2, 1], seed=9) for _ in range(2))
    expected = [straight[position] for position in range(3000)]
    for position in np.random.default_rng(0).permutation(3000)[:300]:
        assert jumping[int(position)] == expected[position]
