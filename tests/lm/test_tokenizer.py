"""Tokenizers of language models from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlip import QLIPError
from qlip.lm.tokenizer import AnswerText, LLMTokenizer
from tests.lm.tokenizers import FAMILIES, TEXTS, made


@pytest.mark.parametrize("family", FAMILIES)
def test_from_folder__reads_what_save_wrote(tmp_path: Path, family: str) -> None:
    tokenizer = made(family)
    tokenizer.save(tmp_path)
    copy = LLMTokenizer.from_folder(tmp_path)
    assert (copy.bos, copy.eos, copy.pad, copy.size) == (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size)
    assert copy.encode("What </s> is it?") == tokenizer.encode("What </s> is it?")
    assert (tmp_path / "tokenizer.json").read_text() == tokenizer._json


def test_from_folder__reads_older_layouts(tmp_path: Path) -> None:
    tokenizer = made("gemma")
    tokenizer.save(tmp_path)
    tokens = {name: tokenizer.config[name] for name in ("bos_token", "eos_token", "pad_token")}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "chat_template.jinja").write_text("<start_of_turn>")
    copy = LLMTokenizer.from_folder(tmp_path)
    assert (copy.bos, copy.eos, copy.chat_template) == (None, tokenizer.eos, "<start_of_turn>")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, 'names no token that ends a text; write "eos_token" into its tokenizer_config.json'),
        ({"eos_token": "<absent>"}, "tokenizer_config.json names eos_token '<absent>', which tokenizer.json lacks"),
    ],
)
def test_tokenizer__an_end_token_is_needed(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        LLMTokenizer(made("gemma")._json, config, "folder")


def test_from_folder__faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match=r"has no tokenizer.json; save its tokenizer there with transformers"):
        LLMTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(QLIPError, match=r"tokenizer.json is not a tokenizer .*; fetch it again"):
        LLMTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(QLIPError, match=r"tokenizer_config.json: not a JSON object; fetch it again"):
        LLMTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_texts__joined_are_the_text(family: str) -> None:
    """Also of characters of several bytes; control tokens have no text."""
    tokenizer, text = made(family), "What colour is größe ✓?"
    texts = tokenizer.token_texts()
    assert b"".join(texts[one] for one in tokenizer.encode(text)) == text.encode()
    assert len(texts) == tokenizer.size and texts[tokenizer.eos] == b""


@pytest.mark.parametrize("family", FAMILIES)
def test_with_tokens__adds_special_ones_and_leaves_the_rest(family: str, tmp_path: Path) -> None:
    tokenizer = made(family)
    grown = tokenizer.with_tokens(("<boi>", "<eoi>"))
    assert (grown.token("<boi>"), grown.token("<eoi>"), grown.size) == (
        tokenizer.size,
        tokenizer.size + 1,
        tokenizer.size + 2,
    )
    text = "How many <boi> are there?"
    assert grown.encode(text) == tokenizer.encode(text) and grown.decode([grown.token("<boi>")]) == ""
    assert grown.with_tokens(("<eoi>", "<boi>")).size == grown.size
    grown.save(tmp_path)
    assert LLMTokenizer.from_folder(tmp_path).token("<eoi>") == tokenizer.size + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_all__equals_encode(family: str) -> None:
    tokenizer = made(family)
    texts = [*TEXTS, "", " a", "<|im_end|> is text \ud800"]
    for first in (False, True):
        assert tokenizer.encode_all(texts, first) == [tokenizer.encode(text, first) for text in texts]


def byte_fallback(text: bytes) -> list[int]:
    return [made("gemma").token(f"<0x{byte:02X}>") for byte in text]


@given(st.sampled_from(FAMILIES), st.lists(st.integers(0, 10**6), max_size=40), st.text(max_size=8), st.integers(0, 40))
@example("gemma", byte_fallback("é".encode() + b"\xff"), "", 0)
@example("gemma", [*byte_fallback("é".encode()), made("gemma").eos, *byte_fallback(b"\xff")], "a", 0)
@settings(deadline=None, max_examples=200)
def test_answer_text__pieces_joined_are_the_text_of_all_ids(family: str, ids: list[int], text: str, place: int) -> None:
    """Random ids, broken characters and control tokens among them, with some of a text in between."""
    tokenizer = made(family)
    ids = [one % tokenizer.size for one in ids]
    ids[place:place] = tokenizer.encode(text)
    answer = AnswerText(tokenizer, strip=False)
    pieces = [answer.add(one) for one in ids]
    assert "".join([*pieces, answer.rest()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_text__decodes_each_id_a_few_times(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = made(family), list[int]()
    ids = tokenizer.encode("What colour is the größe ✓ of it? " * 20)
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda some: decoded.append(len(some)) or decode(some))
    answer = AnswerText(tokenizer, strip=False)
    pieces = [answer.add(one) for one in ids]
    assert "".join(pieces) + answer.rest() == decode(ids) and sum(decoded) < 8 * len(ids)
    assert sum(map(bool, pieces)) > len(ids) / 2
