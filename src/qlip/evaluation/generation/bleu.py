"""BLEU-1 to BLEU-4 of a corpus (Papineni et al., 2002)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from qlip.evaluation.evaluators.base import Value
from qlip.evaluation.generation.words import Ngram, ngrams

ORDERS = (1, 2, 3, 4)


def counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What one sentence adds to a corpus.

    Args:
        candidate: words.
        references: words of each.

    Returns:
        (10,) int64: for each order the n-grams that match, clipped by the most any one reference has (section 2.1
        there); for each order the candidate's n-grams; its words; and the words of the reference of closest length,
        the shorter of two as close, as COCO takes it.
    """
    matches, totals = [], []
    for order in ORDERS:
        own, most = ngrams(candidate, order), Counter[Ngram]()
        for reference in references:
            most |= ngrams(reference, order)
        matches.append((own & most).total())
        totals.append(own.total())
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return np.array([*matches, *totals, len(candidate), closest], dtype=np.int64)


def bleu(rows: np.ndarray) -> np.ndarray:
    """The figures of a corpus, or of several.

    Args:
        rows: (..., 10), sums of what :func:`counts` gives.

    Returns:
        (..., 4) float64: BLEU-n is the geometric mean of the precisions up to n, times exp(1 - r / c) where the
        candidates' c words are fewer than the references' r. Nothing is smoothed: no match of an order makes it 0.
    """
    rows = rows.astype(np.float64)
    matches, totals, own, closest = rows[..., :4], rows[..., 4:8], rows[..., 8:9], rows[..., 9:]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(totals > 0, matches / totals, 0.0))
        short = np.where(own > 0, np.minimum(0.0, 1 - closest / own), -np.inf)
        found = np.exp(np.cumsum(logs, axis=-1) / np.array(ORDERS) + short)
    figures: np.ndarray = np.nan_to_num(found, nan=0.0)
    return figures


def corpus_bleu(
    candidates: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Value]:
    """``bleu_1`` to ``bleu_4`` with 95% bootstrap intervals over sentences (Koehn, 2004).

    Args:
        candidates: words of each, at least one.
        references: words of each reference of each candidate.
        seed, resamples: of the bootstrap.
    """
    rows = np.stack([counts(one, others) for one, others in zip(candidates, references, strict=True)])
    values, count = bleu(rows.sum(0)), len(rows)
    low: Sequence[float | None] = [None] * 4
    high: Sequence[float | None] = [None] * 4
    if count > 1:
        draw = np.random.default_rng(seed)
        sums = np.stack([draw.multinomial(count, np.full(count, 1 / count)) @ rows for _ in range(resamples)])
        low, high = np.quantile(bleu(sums), [0.025, 0.975], axis=0).tolist()
    return {
        f"bleu_{order}": Value(float(values[at]), low[at], high[at], count, better="higher")
        for at, order in enumerate(ORDERS)
    }
