"""BLEU, CIDEr and METEOR of captions by the scorers of COCO's captions (package pycocoevalcap, arXiv 1504.00325).

What cannot be computed is left out, and a note says why: the package may be absent, and METEOR, like the tokenizer that
the scorers are published with, needs Java.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlip.errors import QLIPError

Texts = dict[int, list[str]]
"""By number of the image, its captions."""
WORD = re.compile(r"\w+(?:['-]\w+)*")


class CaptionScores(NamedTuple):
    """Scores of captions.

    Attributes:
        values: ``bleu_4``, ``cider`` and ``meteor``, those that could be computed, as percentages.
        notes: what was left out, or computed in another way, and why.
    """

    values: Mapping[str, float]
    notes: Mapping[str, str]


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score captions against references.

    Args:
        captions: one of each image.
        references: one or more of each image.

    Raises:
        QLIPError: no captions, not as many references, or an image without one.
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise QLIPError(f"{len(captions)} captions, {len(references)} lists of references; give one or more each")
    try:
        bleu, cider = (_scorer(name) for name in ("bleu.bleu.Bleu", "cider.cider.Cider"))
    except ModuleNotFoundError:
        return CaptionScores({}, {"bleu_4": "BLEU, CIDEr and METEOR are left out: pip install pycocoevalcap"})
    java = shutil.which("java") is not None
    split = _by_stanford if java else _by_words
    given = split({number: [one] for number, one in enumerate(captions)})
    wanted = split({number: list(several) for number, several in enumerate(references)})
    values = {"bleu_4": bleu(4).compute_score(wanted, given, verbose=0)[0][3]}
    values["cider"] = cider().compute_score(wanted, given)[0]
    notes = dict[str, str]()
    if java:
        values["meteor"] = _scorer("meteor.meteor.Meteor")().compute_score(wanted, given)[0]
    else:
        notes["meteor"] = "METEOR is left out: it needs Java; words are split without Stanford's tokenizer"
    return CaptionScores({name: 100 * float(one) for name, one in values.items()}, notes)


def _scorer(name: str) -> Any:
    module, _, scorer = name.rpartition(".")
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)


def _by_stanford(texts: Texts) -> Texts:
    """Split into words as the scorers are published, in lower case and without punctuation."""
    found: Texts = _scorer("tokenizer.ptbtokenizer.PTBTokenizer")().tokenize(
        {number: [{"caption": one} for one in several] for number, several in texts.items()}
    )
    return found


def _by_words(texts: Texts) -> Texts:
    return {number: [" ".join(WORD.findall(one.lower())) for one in several] for number, several in texts.items()}
