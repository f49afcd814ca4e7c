"""Labels of conversations are the assistant's turns, for every template and kind of tokenizer."""

from __future__ import annotations

import json
import pickle
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qlip import QLIPError
from qlip.vlm.config import IGNORED, IMAGE_ID
from qlip.vlm.conversations import IMAGE, Conversation, Turn
from qlip.vlm.labels import Example, encode_conversation
from qlip.vlm.templates import EOS, TEMPLATES, token_of
from tests.lm.tokenizers import FAMILIES, made

N = 4
NO_LIMIT = 1 << 30
SEPARATORS = (
    " ASSISTANT: ",
    "USER: ",
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<end_of_turn>\n<start_of_turn>model\n",
    "\n",
    "  ",
    "{}",
    "{eos}",
)
words = st.lists(st.sampled_from(["red", "What is it?", "é", "蓝", *SEPARATORS]), max_size=5).map(" ".join)
answers = st.one_of(words, st.lists(st.sampled_from([IMAGE, "two", "\n"]), max_size=3).map("".join))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns, images = [], 0
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(words, min_size=1, max_size=3))
        images += len(parts) - 1
        turns += [Turn("user", IMAGE.join(parts)), Turn("assistant", draw(answers))]
    if not images:
        turns[0] = Turn("user", IMAGE + turns[0].text)
        images = 1
    return Conversation("one", tuple(range(images)), tuple(turns))


def runs(example: Example) -> list[list[int]]:
    """Labels without a gap."""
    groups = groupby(example.labels.tolist(), key=lambda label: label != IGNORED)
    return [list(group) for trained, group in groups if trained]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=5, deadline=None)
@given(conversation=conversations())
def test_labels__are_the_assistants_turns(name: str, family: str, conversation: Conversation) -> None:
    template, tokenizer = TEMPLATES[name], made(family)
    example = encode_conversation(conversation, template, tokenizer, N, NO_LIMIT)
    ids, labels = example.ids.tolist(), example.labels.tolist()
    assert all(label in (one, IGNORED) for one, label in zip(ids, labels, strict=True))
    assert ids.count(IMAGE_ID) == N * len(conversation.images) and example.num_images == len(conversation.images)
    assert all(len(list(group)) % N == 0 for key, group in groupby(ids) if key == IMAGE_ID)
    answers = [turn.text.strip() for turn in conversation.turns if turn.role == "assistant"]
    found = runs(example)
    end = tokenizer.encode(template.end) if template.end == "\n" else [token_of(template.end, tokenizer)]
    if name == "plain" and any(IMAGE not in one.text for one in conversation.turns if one.role == "user"):
        text = "".join(answer + "\n" for answer in answers)  # answers side by side, without anything between
        assert "".join(tokenizer.decode(run).removeprefix(" ") for run in found) == text  # Llama 2's space
        return
    assert len(found) == len(answers)
    for run, answer in zip(found, answers, strict=True):
        assert run[-len(end) :] == end or name == "plain"
        body = run if name == "plain" else run[: -len(end)]
        assert not {token_of(one, tokenizer) for one in (EOS, *template.tokens)} & set(body)
        text = tokenizer.decode(body)
        if name == "plain":
            assert text.removeprefix(" " * bool(answer)) == answer + "\n"  # Llama 2's space behind an image
        else:
            assert text == template.lead * bool(answer) + answer


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=10, deadline=None)
@given(conversation=conversations(), family=st.sampled_from(FAMILIES), share=st.floats(0, 1))
def test_labels__truncation_keeps_the_beginning(
    name: str, family: str, conversation: Conversation, share: float
) -> None:
    template, tokenizer = TEMPLATES[name], made(family)
    whole = encode_conversation(conversation, template, tokenizer, N, NO_LIMIT)
    limit = int(share * len(whole.ids))
    try:
        cut = encode_conversation(conversation, template, tokenizer, N, limit)
    except QLIPError as error:
        room = limit
        while (whole.ids[:room] == IMAGE_ID).sum() % N:  # an image that does not fit whole
            room -= 1
        assert (whole.labels[:room] == IGNORED).all()
        assert str(error).startswith(f"one: no label fits in max_length {limit}")
        return
    length = len(cut.ids)
    assert length <= limit and cut.ids.equal(whole.ids[:length]) and cut.labels.equal(whole.labels[:length])
    assert cut.labels[-1] != IGNORED
    assert (cut.ids == IMAGE_ID).sum() == N * cut.num_images
    assert (cut.labels != IGNORED).sum() + cut.cut == (whole.labels != IGNORED).sum()


QUESTIONS = (
    Turn("user", f"{IMAGE}\nWhat colour is the circle?"),
    Turn("assistant", "It is red."),
    Turn("user", f"and the square in{IMAGE}that?"),
    Turn("assistant", "dark blue"),
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("images", [0, 2])
def test_ids__are_those_of_the_whole_text(name: str, family: str, images: int) -> None:
    template, tokenizer = TEMPLATES[name], made(family)
    turns = QUESTIONS if images else tuple(Turn(one.role, one.text.replace(IMAGE, " ")) for one in QUESTIONS)
    conversation = Conversation("one", (0,) * images, turns)
    example = encode_conversation(conversation, template, tokenizer, 1, NO_LIMIT)
    file = Tokenizer.from_str(tokenizer._json)
    file.no_truncation()
    file.add_special_tokens([IMAGE])
    text = template.render(conversation, eos=file.id_to_token(tokenizer.eos))
    expected = file.encode(text.removesuffix(template.after), add_special_tokens=bool(template.begin)).ids
    image = file.token_to_id(IMAGE)
    assert example.ids.tolist() == [IMAGE_ID if one == image else one for one in expected]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["v1", "chatml", "llama3", "gemma"])
def test_ids__names_of_control_tokens_are_text(name: str, family: str) -> None:
    template, tokenizer = TEMPLATES[name], made(family)
    control = {tokenizer.token(one) for one in template.tokens} | {tokenizer.eos, tokenizer.bos, tokenizer.pad}

    def count(question: str, answer: str) -> int:
        turns = (Turn("user", question), Turn("assistant", answer))
        ids = encode_conversation(Conversation("one", (), turns), template, tokenizer, N, NO_LIMIT).ids
        return sum(one in control for one in ids.tolist())

    names = f"<s></s><pad><bos><eos><|begin_of_text|>{''.join(SEPARATORS)}"
    assert count(names, names + IMAGE) == count("a", "b")


def test_ids__images_stand_where_the_text_says() -> None:
    tokenizer, template = made("smollm2"), TEMPLATES["chatml"]
    turns = (Turn("user", f"{IMAGE}\nand {IMAGE}?"), Turn("assistant", "red"))
    ids = encode_conversation(Conversation("one", (1, 2), turns), template, tokenizer, N, NO_LIMIT).ids.tolist()
    begin = [tokenizer.token("<|im_start|>"), *tokenizer.encode("user\n")]
    assert ids[: len(begin)] == begin
    rest = ids[len(begin) :]
    middle = tokenizer.encode("\nand ")
    assert rest[: 2 * N + len(middle)] == [IMAGE_ID] * N + middle + [IMAGE_ID] * N


def test_ids__plain_reads_images_and_captions_alone() -> None:
    tokenizer = made("llama3")
    turns = (Turn("user", f"Describe it.\n{IMAGE}"), Turn("assistant", "a red circle"))
    example = encode_conversation(Conversation("one", (1,), turns), TEMPLATES["plain"], tokenizer, N, NO_LIMIT)
    caption = tokenizer.encode("a red circle\n")
    assert example.ids.tolist() == [tokenizer.bos, *[IMAGE_ID] * N, *caption]
    assert example.labels.tolist() == [IGNORED] * (N + 1) + caption


@pytest.mark.parametrize(
    ("turns", "images", "name", "message"),
    [
        ((), 0, "v1", "one: has no question"),
        ((Turn("user", "x"),), 0, "v1", "one: has no answer to learn from"),
        ((Turn("user", "x"), Turn("assistant", "y")), 1, "v1", "<image> stands 0 times in its questions, but it has 1"),
        ((Turn("user", IMAGE * 2), Turn("assistant", "y")), 1, "v1", "<image> stands 2 times"),
        ((Turn("user", "x"), Turn("assistant", IMAGE)), 1, "v1", "<image> stands 0 times"),
        ((Turn("system", "x"), Turn("user", "x")), 0, "gemma", "has a system turn, which the template gemma lacks"),
        ((Turn("user", "x"), Turn("system", "x")), 0, "v1", "a system turn that is not the first"),
    ],
)
def test_labels__a_conversation_without_any_is_named(
    turns: tuple[Turn, ...], images: int, name: str, message: str
) -> None:
    with pytest.raises(QLIPError, match=message):
        encode_conversation(Conversation("one", (0,) * images, turns), TEMPLATES[name], made("llama2"), N, NO_LIMIT)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer__text_survives_and_workers_get_the_same(family: str) -> None:
    tokenizer = made(family)
    for text in (" red", "red", "  a\n\n b ", "<|im_end|></s>", "蓝 é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("</s> red") == tokenizer.encode("</s> red")
    assert (copy.bos, copy.eos, copy.pad, copy.size) == (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size)
    assert (tokenizer.bos is None) == (family == "smollm2")
    assert tokenizer.eos < tokenizer.size and len(tokenizer.encode("red " * 30)) > 24
    assert json.loads(tokenizer._json)["truncation"] is not None
