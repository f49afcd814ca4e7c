"""Vocabularies trained on texts."""

from __future__ import annotations

from qlip.lm.vocabulary import train_tokenizer


def test_train_tokenizer__special_tokens_follow_and_are_no_text() -> None:
    tokenizer = train_tokenizer(["a red circle"] * 4, 300, special=("<boi>", "<eoi>"))
    assert [tokenizer.token(name) for name in ("<pad>", "<eos>", "<boi>", "<eoi>")] == [0, 1, 2, 3]
    assert tokenizer.size <= 300
    text = "a <boi> of 10 \u20ac\n"
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode([2, *ids, 3, 1]) == text
