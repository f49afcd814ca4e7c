"""The order of the stream: permutations are bijections, shares are exact, epochs hold every sample once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlip.data.loader.sampler import BLOCK, BlockShuffle, Mixture, Permutation, ScheduledMixture, apportion, cut_blocks
from qlip.runtime.rng import generator, hash_int


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64))
def test_permutation__is_a_bijection(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


def test_permutation__of_a_large_range_stays_inside_and_differs_by_seed() -> None:
    size = 10**12 + 7
    first, second = Permutation(size, 1), Permutation(size, 2)
    places = [first(index) for index in range(2000)]
    assert len(set(places)) == 2000 and all(0 <= place < size for place in places)
    assert places != [second(index) for index in range(2000)]


def test_permutation__leaves_no_trace_of_the_order() -> None:
    """Neighbours end up as far apart as chance puts them: no correlation of place with index, steps of both signs."""
    size = 5000
    places = np.array([Permutation(size, "x")(index) for index in range(size)])
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.mean(np.diff(places) > 0) - 0.5) < 0.03


def test_permutation__every_place_is_equally_likely() -> None:
    """Over many seeds each of 6 samples comes first equally often (chi-square, 5 degrees, far beyond 0.1%)."""
    counts = Counter(Permutation(6, "seed", seed)(0) for seed in range(3000))
    assert sum((counts[place] - 500) ** 2 / 500 for place in range(6)) < 25


def test_mixture__order_is_pinned() -> None:
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


def test_mixture__weights_are_exact_in_every_block() -> None:
    mixture = Mixture(["a", "b", "c"], [50, 60, 70], [0.5, 0.3, 0.2], seed=0)
    for block in range(3):
        counts = Counter(mixture.sources_at(block * BLOCK + np.arange(BLOCK)).tolist())
        assert counts == {0: 500, 1: 300, 2: 200}


def test_mixture__shares_are_even_within_a_block() -> None:
    mixture = Mixture(["a", "b"], [50, 60], [1, 1], seed=0)
    first = Counter(mixture.sources_at(np.arange(BLOCK // 4)).tolist())
    assert 90 < first[0] < 160


@pytest.mark.parametrize("weights", [[1.0], [1, 1e-9], [3, 1, 1], [1e6, 1, 1, 1], [1 / 3] * 3])
def test_apportion__seats_add_up_and_each_source_has_one(weights: list[float]) -> None:
    seats = apportion(weights, BLOCK)
    assert sum(seats) == BLOCK and min(seats) >= 1
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    assert all(abs(seat - share) <= max(1, len(weights)) for seat, share in zip(seats, exact, strict=True))


@pytest.mark.parametrize("sizes", [[37], [37, 450], [1, 5, 1300]])
def test_mixture__each_sample_once_per_epoch(sizes: list[int]) -> None:
    mixture = Mixture([f"s{number}" for number in range(len(sizes))], sizes, [1.0 + n for n in range(len(sizes))], 5)
    seen: dict[tuple[int, int], Counter[int]] = {}
    for source, epoch, index in zip(*(a.tolist() for a in mixture.places(np.arange(6 * BLOCK))), strict=True):
        seen.setdefault((source, epoch), Counter())[index] += 1
    for number in range(len(sizes)):  # dictionaries keep the order of first sight: one epoch after the other
        epochs = [epoch for source, epoch in seen if source == number]
        assert epochs == list(range(len(epochs)))
    for (source, epoch), counts in seen.items():
        owned = 6 * mixture.slots[source]
        assert max(counts.values()) == 1
        assert len(counts) == min(sizes[source], owned - epoch * sizes[source])


def test_mixture__epochs_and_sources_have_orders_of_their_own() -> None:
    mixture = Mixture(["a"], [100], [1], seed=0)
    first, second = ([mixture[position + 100 * epoch].index for position in range(100)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    other = Mixture(["b"], [100], [1], seed=0)
    assert first != [other[position].index for position in range(100)]


def test_mixture__random_access_equals_sequential() -> None:
    straight, jumping = (Mixture(["a", "b"], [30, 40], [2, 1], seed=9) for _ in range(2))
    expected = [straight[position] for position in range(3000)]
    for position in np.random.default_rng(0).permutation(3000)[:300]:
        assert jumping[int(position)] == expected[position]


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64))
def test_permutation__many_equals_single_calls(size: int, seed: int) -> None:
    permutation, indices = Permutation(size, seed), np.arange(0, size, 1 + size // 50)
    assert permutation.many(indices).tolist() == [permutation(index) for index in indices.tolist()]


def test_permutation__many_works_on_large_ranges() -> None:
    permutation = Permutation(2**62 - 1, 5)
    indices = np.array([0, 1, 2**61, 2**62 - 2])
    assert permutation.many(indices).tolist() == [permutation(index) for index in indices.tolist()]


def test_mixture__places_equals_single_lookups() -> None:
    mixture = Mixture(["a", "b", "c"], [50, None, 70], [0.5, 0.3, 0.2], seed=4)
    positions = np.array([0, 3, 999, 1000, 5234, 17, 123456])
    places = mixture.places(positions)
    for number, position in enumerate(positions.tolist()):
        one = mixture[position]
        assert (one.source, one.epoch, one.index) == tuple(int(array[number]) for array in places)
    assert mixture.sources_at(positions).tolist() == places.sources.tolist()


def test_mixture__source_of_unknown_size_is_only_counted() -> None:
    mixture = Mixture(["a", "b"], [50, None], [1, 1], seed=4)
    places = mixture.places(np.arange(3 * BLOCK))
    assert places.indices[places.sources == 1].tolist() == list(range(3 * BLOCK // 2))


def test_cut_blocks__never_cross_the_border_of_a_file() -> None:
    starts, sizes = cut_blocks([10, 0, 4, 5], 4)
    assert starts.tolist() == [0, 4, 8, 10, 14, 18] and sizes.tolist() == [4, 4, 2, 4, 4, 1]


@given(
    runs=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    block_size=st.integers(1, 50),
    window=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_block_shuffle__is_a_bijection(runs: list[int], block_size: int, window: int, epoch: int) -> None:
    order = BlockShuffle(runs, block_size, window, 7, "order", "a", epoch)
    found = order.many(np.arange(sum(runs)))
    assert sorted(found.tolist()) == list(range(sum(runs)))
    assert [order(index) for index in range(0, sum(runs), 7)] == found[::7].tolist()


def test_block_shuffle__neighbours_are_neighbours_in_the_source() -> None:
    """A window of the order holds just so many blocks; blocks and what is in them are in no order that shows."""
    runs, block_size, window = [100, 260, 37, 500], 20, 4
    starts, sizes = cut_blocks(runs, block_size)
    order = BlockShuffle(runs, block_size, window, 1, "x", 0)
    found = order.many(np.arange(sum(runs)))
    blocks = np.searchsorted(starts, found, side="right") - 1
    at, visited = 0, []
    while at < len(found):
        window_blocks = list(dict.fromkeys(blocks[at:].tolist()))[:window]  # in the order of first sight
        here = blocks[at : at + sizes[window_blocks].sum()]
        assert set(here.tolist()) == set(window_blocks)  # all of them, and of no other
        assert len(here) < 30 or np.count_nonzero(np.diff(here)) > len(here) / 3  # mixed, not one after the other
        visited += sorted(window_blocks)
        at += len(here)
    assert sorted(visited) == list(range(len(starts)))
    assert abs(np.corrcoef(np.arange(len(visited)), visited)[0, 1]) < 0.4
    assert found.tolist() != BlockShuffle(runs, block_size, window, 1, "x", 1).many(np.arange(sum(runs))).tolist()


def test_block_shuffle__order_is_pinned() -> None:
    """A run resumed after an update must find its order: these numbers may never change."""
    assert BlockShuffle([5, 6], 2, 2, 0, "order", "a", 0).many(np.arange(11)).tolist() == [
        7,
        9,
        10,
        8,
        2,
        0,
        1,
        3,
        4,
        6,
        5,
    ]


# mixtures whose weights follow the block


def ramp(block: int) -> list[float]:
    """A source that fades out until block 12, one that fades in, one that stays."""
    share = min(1.0, block / 12)
    return [1 - share, share, 0.25]


SIZES = (170, 1300, 90)


def scheduled(weights: Any = ramp) -> ScheduledMixture:
    return ScheduledMixture(["a", "b", "c"], SIZES, weights, seed=5)


def test_scheduled_mixture__counts_are_the_sums_of_the_blocks_before() -> None:
    mixture = scheduled()
    total = np.zeros(3, np.int64)
    for block in range(20):
        assert mixture.counts_before(block).tolist() == total.tolist()
        slots = mixture.slots_of(block)
        assert sum(slots) == BLOCK and (slots[0] == 0) == (block >= 12)
        found = mixture.sources_at(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert np.bincount(found, minlength=3).tolist() == slots
        total += slots
    assert mixture.slots_of(0)[1] == 0


def test_scheduled_mixture__each_sample_once_per_epoch() -> None:
    places = scheduled().places(np.arange(20 * BLOCK))
    for source, size in enumerate(SIZES):
        mine = places.sources == source
        count = int(mine.sum())
        seen = Counter(zip(places.epochs[mine].tolist(), places.indices[mine].tolist(), strict=True))
        assert max(seen.values()) == 1
        full = count // size
        assert full > 0 and set(seen) >= {(epoch, index) for epoch in range(full) for index in range(size)}
        assert len(seen) == count and max(epoch for epoch, _ in seen) <= full


def test_scheduled_mixture__random_access_equals_sequential() -> None:
    sequential = scheduled().places(np.arange(20 * BLOCK))
    positions = np.random.default_rng(0).permutation(20 * BLOCK)[:500]
    mixture = scheduled()
    mixture.STRIDE = 3
    for position in positions.tolist():
        place = mixture[position]
        wanted = (sequential.sources[position], sequential.epochs[position], sequential.indices[position])
        assert (place.source, place.epoch, place.index) == wanted
    for block in (19, 0, 7, 6, 8, 3, 19):
        assert mixture.counts_before(block).tolist() == scheduled().counts_before(block).tolist()


def test_scheduled_mixture__constant_weights_equal_mixture() -> None:
    weights = [0.5, 0.3, 0.2]
    plain = Mixture(["a", "b", "c"], SIZES, weights, seed=5)
    positions = np.random.default_rng(1).integers(0, 3_000_000, 5000)
    for mine, wanted in zip(scheduled(lambda block: weights).places(positions), plain.places(positions), strict=True):
        assert np.array_equal(mine, wanted)
    one = ScheduledMixture(["a"], [170], lambda block: [3], seed=5).places(positions)
    assert np.array_equal(one.indices, Mixture(["a"], [170], [1], seed=5).places(positions).indices)


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, -1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_scheduled_mixture__refuses_weights_that_make_no_shares(weights: list[float]) -> None:
    mixture = scheduled(lambda block: [1, 1, 1] if block < 4 else weights)
    with pytest.raises(ValueError, match="block 4: weights .*; need 3 numbers >= 0, not all 0"):
        mixture[4 * BLOCK]
    with pytest.raises(ValueError, match="block 4: "):
        mixture.counts_before(7)
