"""METEOR without synonyms: cases by hand, and its search against trying every alignment."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from qlip.evaluation.generation.meteor import aligned, chunks, meteor
from qlip.evaluation.generation.stem import stem

Pairs = list[tuple[int, int]]


def test_cases_by_hand() -> None:
    # the examples that encyclopedias print
    reference = "the cat sat on the mat".split()
    for candidate, score in (
        ("the cat sat on the mat", 0.9977),  # 6 matches, 1 chunk
        ("the cat was sat on the mat", 0.9654),  # 6 of 7, 2 chunks
        ("on the mat sat the cat", 0.5),  # fewest crossings leave no two matches side by side: 6 chunks
    ):
        assert meteor(candidate.split(), [reference]) == pytest.approx(score, abs=5e-5)
    # 12 of 18 words match 12 of 16, in the chunks 6 + 4 + 1 + 1
    candidate = "it is a guide to action which ensures that the military always obeys the commands of the party".split()
    reference = "it is a guide to action that ensures that the military will forever heed party commands".split()
    precision, recall = 12 / 18, 12 / 16
    expected = 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (4 / 12) ** 3)
    assert meteor(candidate, [reference]) == pytest.approx(expected)


def test_stems_match_after_words_and_the_best_reference_counts() -> None:
    candidate = "a dog jumping over fences".split()
    assert aligned(candidate, "the dog jumps over a fence".split()) == [(0, 4), (1, 1), (2, 2), (3, 3), (4, 5)]
    good, bad = "a dog jumps over fences".split(), "birds".split()
    assert meteor(candidate, [bad, good]) == meteor(candidate, [good]) > 0.9
    assert meteor(candidate, [bad]) == 0 and meteor([], [good]) == 0 and meteor(candidate, [[]]) == 0


def crossings(pairs: Pairs) -> int:
    return sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(pairs, 2))


def best(candidate: list[str], reference: list[str]) -> tuple[int, int, int]:
    """(matches, crossings, chunks) of the best alignment of all, of equal words."""
    found = [(0, 0, 0)]
    for size in range(1, min(len(candidate), len(reference)) + 1):
        for own in combinations(range(len(candidate)), size):
            for other in permutations(range(len(reference)), size):
                pairs = list(zip(own, other, strict=True))
                if all(candidate[a] == reference[b] for a, b in pairs):
                    found.append((-size, crossings(pairs), chunks(pairs)))
    return min(found)


def test_the_search_finds_what_trying_all_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        candidate, reference = (list(rng.choice(list("xyz"), rng.integers(1, 6))) for _ in range(2))
        pairs = aligned(candidate, reference)
        assert (-len(pairs), crossings(pairs), chunks(pairs)) == best(candidate, reference), (candidate, reference)


def test_what_repeats_itself_forever_is_scored_quickly() -> None:
    pairs = aligned(["a"] * 120 + ["b"], ["a", "b"] * 30)
    assert len(pairs) == 31
    assert meteor(["a"] * 120, [["a", "b"]]) < 0.1


def test_the_second_stage_takes_what_the_first_left() -> None:
    candidate, reference = "runs running run".split(), "run runs ran".split()
    pairs = aligned(candidate, reference)
    assert pairs == [(0, 1), (2, 0)] and stem("running") == stem("run")
