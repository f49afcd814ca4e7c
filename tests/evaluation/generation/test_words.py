"""Captions to words, as COCO's tokenizer cuts them, and where it differs as the docstring says."""

from __future__ import annotations

import pytest

from qlip.evaluation.generation.words import ngrams, tokenized

SENTENCES = {
    "A man riding a horse.": "a man riding a horse",
    "Two dogs' bowls; one dog's bed!": "two dogs bowls one dog 's bed",
    "It's a cat that doesn't move, can't see and won't eat.": (
        "it 's a cat that does n't move ca n't see and wo n't eat"
    ),
    "You cannot; I'm gonna, they've got it, we'd go": "you can not i 'm gon na they 've got it we 'd go",
    "a half-eaten pizza on a red-and-white cloth": "a half-eaten pizza on a red-and-white cloth",
    "1,000 people at 3:30 with $5.50 & 20% off": "1,000 people at 3:30 with $ 5.50 & 20 % off",
    "The U.S. flag -- in a.m. light...": "the u.s. flag in a.m. light",
    "\u201cGreat\u201d view \u2013 don\u2019t miss\u2014it": "great view do n't miss it",
    "Mr. Smith (left) at five o'clock": "mr smith left at five o'clock",
    "un chat \u00e0 c\u00f4t\u00e9": "un chat \u00e0 c\u00f4t\u00e9",
    "  \n": "",
    "...!?": "",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence: str) -> None:
    assert tokenized(sentence) == SENTENCES[sentence].split()


def test_runs_of_words_are_counted() -> None:
    assert ngrams("the the the cat".split(), 2) == {("the", "the"): 2, ("the", "cat"): 1}
    assert not ngrams(["one"], 2)
