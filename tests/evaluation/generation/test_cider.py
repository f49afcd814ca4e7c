"""CIDEr-D against the reference scorer's published figure, a literal twin, and what the paper says of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from qlip import QLIPError
from qlip.evaluation.generation.cider import DocumentFrequencies, cider_d

from .published import CANDIDATES, REFERENCES

Words = list[str]


def split(references: list[list[str]]) -> list[list[Words]]:
    return [[one.split() for one in some] for some in references]


def test_the_reference_scorers_published_figure() -> None:
    references = split(REFERENCES)
    known = DocumentFrequencies.of(references)
    scores = [cider_d(one.split(), some, known) for one, some in zip(CANDIDATES, references, strict=True)]
    assert np.mean(scores) == pytest.approx(1.242192, abs=1e-6)


def twin(candidate: Words, references: list[Words], corpus: list[list[Words]]) -> float:
    """The paper's formulas over the whole vocabulary, vectors written out."""

    def runs(words: Words, n: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    total = 0.0
    for n in (1, 2, 3, 4):
        vocabulary = sorted(
            {g for some in [*corpus, [candidate], references] for words in some for g in runs(words, n)}
        )
        idf = [
            math.log(len(corpus) / max(1, sum(any(g in runs(words, n) for words in some) for some in corpus)))
            for g in vocabulary
        ]

        def vector(
            words: Words, n: int = n, vocabulary: list[tuple[str, ...]] = vocabulary, idf: list[float] = idf
        ) -> np.ndarray:
            return np.array([runs(words, n).count(g) * weight for g, weight in zip(vocabulary, idf, strict=True)])

        own = vector(candidate)
        for reference in references:
            other = vector(reference)
            norms = np.linalg.norm(own) * np.linalg.norm(other)
            if norms:
                length = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * 36))
                total += length * float(np.minimum(own, other) @ other) / norms / len(references) / 4
    return 10 * total


def test_random_captions_against_a_literal_twin() -> None:
    rng = np.random.default_rng(0)

    def sentence() -> Words:
        return list(rng.choice(list("abcdefgh"), rng.integers(1, 9)))

    corpus = [[sentence() for _ in range(rng.integers(1, 4))] for _ in range(12)]
    known = DocumentFrequencies.of(corpus)
    for references in corpus:
        candidate = sentence()
        expected = twin(candidate, references, corpus)
        assert cider_d(candidate, references, known) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_reference_itself_scores_10_and_repeating_a_word_gains_nothing() -> None:
    corpus = split([["a red car stops here"], ["two dogs run in snow"], ["one boat on a lake"]])
    known = DocumentFrequencies.of(corpus)
    assert cider_d(corpus[1][0], corpus[1], known) == pytest.approx(10)
    once = cider_d("two dogs run in sand".split(), corpus[1], known)
    assert cider_d("two dogs dogs dogs dogs run in sand".split(), corpus[1], known) < once < 10
    assert cider_d([], corpus[1], known) == 0 and cider_d(["unseen"], corpus[1], known) == 0


def test_frequencies_of_a_larger_set_are_kept_in_a_file(tmp_path: Path) -> None:
    corpus = split([["a red car"], ["a dog", "a brown dog"], ["a boat"]])
    known = DocumentFrequencies.of(corpus, "photos:val")
    assert known.counts[("a",)] == 3 and known.counts[("dog",)] == 1 and known.pictures == 3
    known.save(tmp_path / "known.json")
    assert DocumentFrequencies.load(tmp_path / "known.json") == known
    with pytest.raises(QLIPError, match="none.json: No such file or directory; give frequencies"):
        DocumentFrequencies.load(tmp_path / "none.json")
    (tmp_path / "known.json").write_text('{"pictures": 3}')
    with pytest.raises(QLIPError, match="known.json: no document frequencies"):
        DocumentFrequencies.load(tmp_path / "known.json")
