"""Intervals called 95% hold the true value in about 95 of 100 draws; measured by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlip.evaluation.evaluators.base import mean
from qlip.evaluation.metrics.frechet import Moments, frechet_distance, frechet_jackknife
from qlip.evaluation.metrics.intervals import jackknife, mean_interval, paired_difference, proportion_interval
from qlip.evaluation.metrics.kid import kernel_jackknife, unbiased_mmd

DRAWS = 400


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [5, 20, 200])
def test_proportion_interval__covers_near_the_ends_and_for_few_images(share: float, count: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(DRAWS):
        low, high = proportion_interval((rng.random(count) < share).astype(float))
        assert low is not None and high is not None and 0 <= low < high <= 1
        held += low - 1e-12 <= share <= high + 1e-12
    assert 0.90 <= held / DRAWS <= 1  # 0.16 by bootstrap percentiles at 99% and 20 images


def test_proportion_interval__equals_wilsons_for_19_of_20() -> None:
    low, high = proportion_interval(np.array([1.0] * 19 + [0.0]))
    assert (low, high) == (pytest.approx(0.7639, abs=1e-4), pytest.approx(0.9911, abs=1e-4))
    value = mean(torch.tensor([True] * 19 + [False]), unit="%", scale=100)
    assert value.value == 95 and value.high == pytest.approx(99.11, abs=0.01)


def test_proportion_interval__captions_of_an_image_are_not_independent() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(DRAWS):  # five captions of each of 60 images that stand or fall together
        hits = 5.0 * (rng.random(60) < 0.9)
        low, high = proportion_interval(hits, np.full(60, 5.0))
        held += low is not None and high is not None and low <= 0.9 <= high
    assert 0.91 <= held / DRAWS <= 0.98


@pytest.mark.parametrize("count", [3, 10, 60])
def test_mean_interval__covers_for_few_images_too(count: int) -> None:
    rng, held = np.random.default_rng(0), 0
    for draw in range(DRAWS):
        low, high = mean_interval(rng.normal(28, 4, count), seed=draw, resamples=400)
        held += low is not None and high is not None and low <= 28 <= high
    assert 0.91 <= held / DRAWS <= 0.98  # bootstrap percentiles: 0.75 for 3 images


def test_mean_interval__nothing_is_said_of_one_image_or_infinite_values() -> None:
    assert mean_interval(np.array([1.0])) == mean_interval(np.array([1.0, np.inf])) == (None, None)
    assert proportion_interval(np.array([1.0])) == (None, None)


@pytest.mark.parametrize("kind", ["hits", "decibels"])
def test_paired_difference__covers_and_is_narrower_than_two_intervals(kind: str) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        images = rng.normal(28, 4, 100)  # how hard an image is, for both models
        first, second = images + rng.normal(0.2, 0.5, 100), images + rng.normal(0, 0.5, 100)
        true = 0.2
        if kind == "hits":
            both = rng.random(100)
            first, second, true = 100.0 * (both < 0.95), 100.0 * (both < 0.9), 5.0
        found = paired_difference(first, second)
        assert found is not None
        held += found.low <= true <= found.high
        if kind == "decibels":
            assert found.high - found.low < 0.4  # the interval of either mean is 1.6 dB wide
    assert 0.90 <= held / 200 <= 1


def test_paired_difference__exact_images_are_left_out() -> None:
    found = paired_difference(np.array([30.0, np.inf, 31, 32]), np.array([29.0, 20, np.inf, 31]))
    assert found is not None and (found.difference, found.images) == (1, 2)
    assert paired_difference(np.array([np.inf, 1]), np.array([1.0, 1])) is None


def test_jackknife__gives_the_error_of_a_mean_and_the_bias_of_a_variance() -> None:
    numbers = np.random.default_rng(0).normal(0, 2, 30)
    without = [np.delete(numbers, one) for one in range(30)]
    error = jackknife(numbers.mean(), [one.mean() for one in without])
    assert error == (pytest.approx(numbers.std(ddof=1) / 30**0.5), pytest.approx(0, abs=1e-9))
    biased = jackknife(numbers.var(), [one.var() for one in without])
    assert biased.bias == pytest.approx(-numbers.var(ddof=1) / 30)


def sets(draw: int, count: int, dimensions: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(draw)
    first, second = rng.normal(0, 1, (2, count, dimensions))
    return torch.from_numpy(first), torch.from_numpy(second + shift)


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    both = [Moments(first.shape[1]), Moments(first.shape[1])]
    both[0].add(first)
    both[1].add(second)
    return frechet_distance(*both).distance


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
@pytest.mark.parametrize("paired", [False, True])
def test_jackknife__intervals_of_distances_cover_their_expectation(kind: str, paired: bool) -> None:
    values, bounds = [], []
    for draw in range(80):
        first, second = sets(draw, 120, 4, 0.6)
        second = first + 0.3 * (second - 0.6) + 0.6 if paired else second
        if kind == "frechet":
            value, found = frechet(first, second), frechet_jackknife(first, second, paired, (1, 1))
        else:
            value, found = unbiased_mmd(first, second), kernel_jackknife(first, second, paired)
        values.append(value)
        bounds.append(found.interval(value))
    expected = np.mean(values)
    assert 0.88 <= np.mean([low <= expected <= high for low, high in bounds]) <= 1


@pytest.mark.parametrize("times", [0.5, 2, 8])
def test_frechet_jackknife__its_bias_is_the_whole_distance_of_two_draws_of_one_distribution(times: float) -> None:
    shares = []
    for draw in range(5):
        first, second = sets(draw, int(times * 24), 24, 0.0)
        shares.append(frechet_jackknife(first, second, False, (1, 1)).bias / frechet(first, second))
    # below as many images as features the covariances are singular, and the estimate is only a lower bound
    assert 0.2 < np.mean(shares) < 1.2 if times < 1 else 0.8 < np.mean(shares) < 1.2


def test_frechet_jackknife__estimates_over_a_part_shrink_with_the_number_of_all() -> None:
    first, second = sets(0, 100, 4, 0.5)
    part, whole = (frechet_jackknife(first, second, False, (share, share)) for share in (1.0, 0.25))
    assert whole.error == pytest.approx(part.error / 2) and whole.bias == pytest.approx(part.bias / 4)
