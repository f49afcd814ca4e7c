"""Sentences to words for caption metrics: COCO's way, near enough to compare, and where it differs.

COCO's scorers run Stanford's PTBTokenizer, lower the case and drop punctuation. This does what it does to captions:
clitics are words of their own (``it 's``, ``do n't``, ``can not``), hyphens and full stops inside a word stay
(``half-eaten``, ``u.s.``), numbers stay whole (``1,000``, ``3:30``), and the same marks are dropped. It differs in
that a full stop after an abbreviation is dropped like any other (``mr.`` becomes ``mr``), that brackets are dropped
where Stanford writes ``-lrb-``, and that addresses, dates and emoticons are cut at their marks. Two captions cut in
one way are compared fairly by any of the metrics; figures of papers differ from these in the third decimal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]

_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": " - ", "\u2014": " - "})
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(lem|gim)(me)\b")
_NEGATION = re.compile(r"(?<=\w)(n't)\b")
_CLITIC = re.compile(r"(?<=\w)('(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    r"n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"  # clitics
    r"|\d+(?:[.,:/]\d+)*(?:\w|-\w)*"  # numbers
    r"|(?:[^\W\d_]\.){2,}"  # u.s., a.m.
    r"|\w+(?:[-'./&]\w+)*"  # words, with what may be inside
    r"|[$%&#*+=@<>~^|\\]"  # marks that COCO keeps
)


def tokenized(sentence: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    text = sentence.translate(_QUOTES).lower()
    text = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text)
    text = _CLITIC.sub(r" \1 ", _NEGATION.sub(r" \1 ", text))
    return _WORD.findall(text)


def ngrams(words: Sequence[str], order: int) -> Counter[Ngram]:
    """How often each run of ``order`` words occurs."""
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
