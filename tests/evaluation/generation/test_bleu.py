"""BLEU against the reference scorers' published figures, the paper's examples, torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest

from qlip.evaluation.generation.bleu import bleu, corpus_bleu, counts

from .published import CANDIDATES, REFERENCES

NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
Words = list[str]


def figures(candidates: list[str], references: list[list[str]]) -> list[float]:
    found = corpus_bleu([one.split() for one in candidates], [[one.split() for one in some] for some in references])
    return [found[name].value for name in NAMES]


def test_the_reference_scorers_published_figures() -> None:
    # nlg-eval's own test of COCO's scorers, to as many digits as it gives
    assert figures(CANDIDATES, REFERENCES) == pytest.approx([0.55, 0.428174, 0.284043, 0.201143], abs=1e-6)
    single = figures(["this is a good test"], [["this is a test", "this is also a test"]])
    assert single[:3] == pytest.approx([0.799999, 0.632455, 0.5108729], abs=2e-6)
    assert single[3] == 0  # COCO's scorer, which smooths by 1e-15, gives 9.04e-5


def test_the_papers_clipped_precisions() -> None:
    # section 2.1: "the" seven times, of which the references have two at most
    row = counts(["the"] * 7, ["the cat is on the mat".split(), "there is a cat on the mat".split()])
    assert (row[0], row[4]) == (2, 7)
    first = "it is a guide to action which ensures that the military always obeys the commands of the party".split()
    second = "it is to insure the troops forever hearing the activity guidebook that party direct".split()
    references = [
        "it is a guide to action that ensures that the military will forever heed party commands".split(),
        "it is the guiding principle which guarantees the military forces always being under the command"
        " of the party".split(),
        "it is the practical guide for the army always to heed the directions of the party".split(),
    ]
    row, other = counts(first, references), counts(second, references)
    assert (row[0], row[4], row[1], row[5]) == (17, 18, 10, 17) and (other[0], other[4], other[1], other[5]) == (
        8,
        14,
        1,
        13,
    )


def test_the_closest_reference_counts_and_of_two_the_shorter() -> None:
    words = "a b c d e f".split()
    assert counts(words[:4], [words[:3], words[:5]])[9] == 3
    assert counts(words[:4], [words[:1], words[:5]])[9] == 5
    assert counts([], [words[:1], words[:5]])[8:].tolist() == [0, 1]


def test_shorter_ones_pay_and_longer_ones_do_not() -> None:
    short, long = figures(["a b c d"], [["a b c d e f"]]), figures(["a b c d e f"], [["a b c d"]])
    assert short == pytest.approx([np.exp(1 - 6 / 4)] * 4)
    assert long[0] == pytest.approx(4 / 6)


def test_a_random_corpus_against_torchmetrics() -> None:
    text = pytest.importorskip("torchmetrics.text")
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(list("abcdef"), rng.integers(4, 12)))

    candidates = [sentence() for _ in range(30)]
    references = [[sentence() for _ in range(rng.integers(1, 4))] for _ in range(30)]
    found = figures(candidates, references)
    assert found[3] > 0
    for order in (1, 2, 3, 4):
        metric = text.BLEUScore(n_gram=order)
        assert found[order - 1] == pytest.approx(float(metric(candidates, references)), rel=1e-5)


def test_intervals_are_over_sentences_and_seeded() -> None:
    rng = np.random.default_rng(1)
    candidates = [list(rng.choice(list("abc"), 8)) for _ in range(40)]
    references = [[list(rng.choice(list("abc"), 8))] for _ in range(40)]
    value = corpus_bleu(candidates, references)["bleu_2"]
    assert value.low is not None and value.high is not None and value.low < value.value < value.high
    assert value == corpus_bleu(candidates, references)["bleu_2"] and value.count == 40
    alone = corpus_bleu(candidates[:1], references[:1])["bleu_2"]
    assert alone.low is None and alone.high is None


def test_no_words_at_all_is_0() -> None:
    assert bleu(np.zeros(10, dtype=np.int64)).tolist() == [0, 0, 0, 0]
    assert figures([""], [["a b"]]) == [0, 0, 0, 0]
