"""Documents of text and of images: order of their parts, BOS, and texts that are shortened to fit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlip.um3.data.documents import DocumentBuilder, fit
from tests.lm.tokenizers import made
from tests.um3.data.made import builder, config, tokenizer


def test_documents__parts_stand_in_order() -> None:
    make, own = builder(), tokenizer()
    indices = torch.arange(16).view(4, 4)
    image = [own.token("<boi>"), *(own.size + value for value in range(16)), own.token("<eoi>")]
    text = own.encode("a cat")
    assert make.texts(["a cat"])[0] == [*text, own.eos]
    assert make.pair("image-to-text", text, indices).tolist() == [*image, *text, own.eos]
    assert make.pair("text-to-image", text, indices).tolist() == [*text, *image, own.eos]
    assert make.pair("text-to-image", [], indices).tolist() == image  # behind an image alone comes a text
    assert make.cost == len(image) + 1


def test_documents__begin_with_a_bos_where_the_tokenizer_has_one() -> None:
    own = made("llama3")
    make = DocumentBuilder(config(), own)
    assert own.bos is not None
    ids = make.pair("image-to-text", own.encode("a cat"), torch.zeros(4, 4, dtype=torch.int64))
    assert make.texts(["a cat"])[0][0] == ids[0] == own.bos and (ids == own.bos).sum() == 1
    assert len(ids) == make.cost + len(own.encode("a cat"))


def test_documents__names_of_special_tokens_in_a_text_are_text() -> None:
    ids = builder().texts(["before <boi> <eos> after"])[0]
    assert tokenizer().token("<boi>") not in ids and ids.count(tokenizer().eos) == 1


@given(lengths=st.lists(st.integers(0, 30), max_size=6), room=st.integers(0, 100))
def test_fit__the_longest_are_shortened_and_room_is_filled(lengths: list[int], room: int) -> None:
    found = fit(lengths, room)
    assert sum(found) == min(room, sum(lengths))
    level = max(found, default=0)
    for before, after in zip(lengths, found, strict=True):
        assert after == before or after in (level, level - 1)
