"""CIDEr-D (Vedantam et al., arXiv 1411.5726): n-grams that captions share, the rare ones counting more."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlip.errors import QLIPError
from qlip.evaluation.generation.words import Ngram, ngrams
from qlip.files import write_text

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
"""Words: of the Gaussian that punishes another length."""


@dataclass(frozen=True)
class DocumentFrequencies:
    """In the references of how many images each n-gram occurs.

    Attributes:
        images: how many there are.
        counts: by n-gram, of all orders.
        source: what they are of, in words.
    """

    pictures: int
    counts: dict[Ngram, int]
    source: str

    @classmethod
    def of(cls, references: Sequence[Sequence[Sequence[str]]], source: str = "these references") -> DocumentFrequencies:
        """Counted over the references of images, each a list of words."""
        found: Counter[Ngram] = Counter()
        for captions in references:
            found.update({one for words in captions for order in ORDERS for one in ngrams(words, order)})
        return cls(len(references), dict(found), source)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        counts = {" ".join(one): count for one, count in self.counts.items()}
        write_text(Path(path), json.dumps({"pictures": self.pictures, "source": self.source, "counts": counts}))

    @classmethod
    def load(cls, path: str | Path) -> DocumentFrequencies:
        """Read JSON.

        Raises:
            QLIPError: no such file, or not one of frequencies.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            counts = {tuple(one.split(" ")): int(count) for one, count in found["counts"].items()}
            return cls(int(found["pictures"]), counts, str(found["source"]))
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror}; give frequencies that were saved before") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise QLIPError(f"{path}: no document frequencies; give a file that was saved before") from None


def cider_d(candidate: Sequence[str], references: Sequence[Sequence[str]], frequencies: DocumentFrequencies) -> float:
    """One caption's score, 0 to 10.

    For each order, vectors of term frequency times log(images / document frequency); a candidate's is clipped to
    the reference's, their cosine is taken with the norms of the unclipped ones, times exp(-d^2 / (2 sigma^2)) for
    lengths that are d words apart; averaged over references and orders, times 10 (eq. 5 of the paper's CIDEr-D).
    """
    total = 0.0
    for order in ORDERS:
        own = _weighted(candidate, order, frequencies)
        for reference in references:
            other = _weighted(reference, order, frequencies)
            shared = sum(min(weight, other[one]) * other[one] for one, weight in own.items() if one in other)
            norms = _norm(own) * _norm(other)
            apart = len(candidate) - len(reference)
            if norms > 0:
                total += shared / norms * math.exp(-(apart**2) / (2 * SIGMA**2))
    return 10 * total / (len(ORDERS) * len(references))


def _weighted(words: Sequence[str], order: int, frequencies: DocumentFrequencies) -> dict[Ngram, float]:
    whole = math.log(frequencies.pictures)
    return {
        one: count * (whole - math.log(max(1, frequencies.counts.get(one, 0))))
        for one, count in ngrams(words, order).items()
    }


def _norm(vector: dict[Ngram, float]) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))
