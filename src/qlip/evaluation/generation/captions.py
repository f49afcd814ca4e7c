"""Captions against what people wrote: BLEU, METEOR without synonyms, CIDEr-D, by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Finding, mean
from qlip.evaluation.generation.bleu import corpus_bleu
from qlip.evaluation.generation.cider import DocumentFrequencies, cider_d
from qlip.evaluation.generation.meteor import meteor
from qlip.evaluation.generation.words import tokenized


def measure_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
    seed: int = 0,
) -> Finding:
    """Every figure of captions, each with its interval over images.

    Args:
        candidates: one caption an image, by the image's key.
        references: what people wrote, one or more an image; of the same images.
        frequencies: for CIDEr-D, of n-grams in the references of a larger set; by default of these.
        seed: of the bootstrap.

    Returns:
        ``bleu_1`` to ``bleu_4`` of the corpus, ``meteor_exact_stem`` and ``cider_d`` as means over images; and under
        ``captions`` a table of them.

    Raises:
        QLIPError: not the same images in both, or an image without a reference.
    """
    _check(candidates, references)
    keys = sorted(candidates)
    own = [tokenized(candidates[key]) for key in keys]
    others = [[tokenized(one) for one in references[key]] for key in keys]
    known = frequencies or DocumentFrequencies.of(others)
    found = Finding(dict(corpus_bleu(own, others, seed=seed)))
    meteors = [meteor(words, written) for words, written in zip(own, others, strict=True)]
    ciders = [cider_d(words, written, known) for words, written in zip(own, others, strict=True)]
    for name, scores in (("meteor_exact_stem", meteors), ("cider_d", ciders)):
        found.values[name] = mean(torch.tensor(scores, dtype=torch.float64), better="higher", seed=seed)
    found.notes["meteor_exact_stem"] = "words and stems of METEOR (2005), no synonyms: not the METEOR of COCO's table"
    found.notes["cider_d"] = f"document frequencies of {known.source}, {known.pictures} pictures"
    if known.pictures < 2:
        found.notes["cider_d"] += "; of a single picture every word is common and the figure 0"
    if silent := sum(not words for words in own):
        found.notes["captions"] = f"{silent} of {len(own)} captions have no word"
    found.tables["captions"] = [
        {"key": key, "caption": candidates[key], "meteor_exact_stem": one, "cider_d": other}
        for key, one, other in zip(keys, meteors, ciders, strict=True)
    ]
    return found


def caption_settings(frequencies: DocumentFrequencies | None = None) -> dict[str, object]:
    """What figures of captions depend on beside the captions: JSON."""
    return {
        "words": "lower case, as Stanford's PTB tokenizer cuts captions but for abbreviations and brackets",
        "bleu": "corpus, closest reference length, unsmoothed",
        "cider_d": "4 orders, sigma 6, times 10",
        "document frequencies": frequencies.source if frequencies else "the references themselves",
    }


def _check(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not candidates:
        raise QLIPError("captions: there are none to measure")
    if unpaired := sorted(candidates.keys() ^ references.keys()):
        side = "references" if unpaired[0] in candidates else "captions"
        raise QLIPError(
            f"captions: {len(candidates)} of pictures with {len(references)} references; {unpaired[0]!r} has no {side}"
        )
    if bare := next((key for key in sorted(references) if not any(map(str.strip, references[key]))), None):
        raise QLIPError(f"captions: {bare!r} has no reference with a word in it; leave the picture out")
