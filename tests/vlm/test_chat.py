"""Conversations with a vision-language model: prompts as in training, kept keys and values, streaming, batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip import QLIPError, assets
from qlip.data.public.scene_questions import SceneQuestions
from qlip.lm.complete import ENDED
from qlip.lm.sampling import AnswerSettings, Sampling
from qlip.lm.tokenizer import AnswerText
from qlip.vlm.chat import VisionChat
from qlip.vlm.config import IGNORED
from qlip.vlm.conversations import Conversation, Turn
from qlip.vlm.labels import encode_conversation
from qlip.vlm.prompts import NO_LIMIT, last_labels, prompt_of
from qlip.vlm.templates import TEMPLATES

QUESTION = "What colour is the circle?"


def photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 64))


@pytest.fixture
def chat(talker: Callable[[], VisionChat]) -> VisionChat:
    return talker()


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_of__ids_are_those_of_training(chat: VisionChat, template: str) -> None:
    turns = (
        Turn("user", f"<image>\n{QUESTION}"),
        Turn("assistant", "red"),
        Turn("user", "And the\nsquare?"),
        Turn("assistant", "dark blue"),
    )
    whole = Conversation("one", (photo(0),), turns)
    trained = encode_conversation(whole, TEMPLATES[template], chat.tokenizer, 16, NO_LIMIT)
    ids, labels = trained.ids.tolist(), trained.labels.tolist()
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    first = [place for place in places if place - 1 not in places]
    if template == "plain":  # it reads the image alone
        first *= 2
    for asked, begin in zip((1, 3), first, strict=True):
        part = Conversation("one", whole.images, turns[:asked])
        assert prompt_of(part, TEMPLATES[template], chat.tokenizer, 16) == ids[:begin]


def test_prompt_of__a_question_comes_last(chat: VisionChat) -> None:
    for turns in ((), (Turn("user", "x"), Turn("assistant", "y"))):
        with pytest.raises(QLIPError, match="one: has no question"):
            prompt_of(Conversation("one", (), turns), chat.template, chat.tokenizer, 16)


def test_ask__later_questions_equal_a_fresh_run(chat: VisionChat, talker: Callable[[], VisionChat]) -> None:
    images = [photo(0), photo(1)]
    first = chat.ask(QUESTION, images, max_tokens=5)
    second = chat.ask("And the square?", max_tokens=5)
    third = chat.ask("Same here?", [photo(2)], max_tokens=5)
    turns = chat.turns
    assert [one.text for one in turns[1::2]] == [first, second, third]
    fresh = talker()
    shown = [*images, photo(2)]
    for asked, seen in ((1, 2), (3, 2), (5, 3)):
        conversation = Conversation("fresh", tuple(shown[:seen]), turns[:asked])
        assert fresh.answers([conversation], max_tokens=5) == [turns[asked].text]


def test_stream__the_cache_holds_what_a_fresh_run_computes(chat: VisionChat, talker: Callable[[], VisionChat]) -> None:
    chat.ask(QUESTION, [photo(0), photo(1)], max_tokens=4)
    chat.ask("And the square?", max_tokens=4)
    before = chat.turns
    chat.ask("Which is larger?", max_tokens=1)
    fresh = talker()
    fresh.turns, fresh._images = before, chat._images
    fresh.ask("Which is larger?", max_tokens=1)
    assert chat._keys == fresh._keys and chat._cache is not None and fresh._cache is not None
    length = fresh.prefilled
    assert chat.prefilled < length
    torch.testing.assert_close(
        chat._cache.stored[..., :length, :], fresh._cache.stored[..., :length, :], rtol=1e-5, atol=1e-5
    )


def test_stream__a_later_question_prefills_its_own_tokens_alone(
    chat: VisionChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    features = chat.model.image_features

    def counted(pixels: Tensor) -> Tensor:
        encoded.append(len(pixels))
        return features(pixels)

    monkeypatch.setattr(chat.model, "image_features", counted)
    chat.ask(QUESTION, [photo(0), photo(1)], max_tokens=1)
    assert chat.prefilled == len(chat._keys) - 1 > 32
    whole = len(chat._keys)
    chat.ask("And the square?", max_tokens=1)
    assert chat.prefilled == len(chat._keys) - 1 - whole + 1  # the answer's only id was not in the cache yet
    assert encoded == [2]
    chat.reset()
    assert chat.turns == ()
    chat.ask(QUESTION, [photo(0), photo(2)], max_tokens=1)
    assert encoded == [2, 1]
    assert chat.prefilled < 32  # the first image is in the cache


def test_stream__an_image_is_told_from_another(chat: VisionChat, talker: Callable[[], VisionChat]) -> None:
    answers = [chat.ask(QUESTION, [photo(0)], max_tokens=6)]
    for seed in (1, 2, 3):
        chat.reset()
        answers.append(chat.ask(QUESTION, [photo(seed)], max_tokens=6))
    assert len(set(answers)) > 1
    fresh = talker()
    assert fresh.ask(QUESTION, [photo(3)], max_tokens=6) == answers[-1]


def test_stream__what_was_taken_is_in_the_conversation(chat: VisionChat) -> None:
    pieces = iter(chat.stream(QUESTION, [photo(0)], max_tokens=20))
    taken = next(pieces)
    second = chat.ask("And now?", max_tokens=3)  # ends the first answer
    assert next(pieces, None) is None
    assert [one.text for one in chat.turns[1::2]] == [taken, second]
    unread = chat.stream("Never answered?")
    assert chat.ask("And then?", max_tokens=1) == chat.turns[-1].text and next(iter(unread), None) is None
    assert len(chat.turns) == 6


def test_stream__pieces_join_to_the_answer_and_seeds_repeat(chat: VisionChat) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    found = []
    for seed in (1, 1, 2):
        chat.reset()
        pieces = list(chat.stream(QUESTION, [photo(0)], seed=seed, **options))
        assert "".join(pieces) == chat.turns[-1].text == "".join(pieces).strip()
        found.append("".join(pieces))
    assert found[0] == found[1] != found[2]


def test_answer_text__whole_characters_alone(chat: VisionChat) -> None:
    text = "naïve 5 € 😀 日本"
    ids = [id for character in text for byte in character.encode() for id in byte_ids(chat, byte)]
    answer = AnswerText(chat.tokenizer)
    pieces = [answer.add(one) for one in ids]
    assert "".join(pieces) + answer.rest() == text and "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) < len(text.encode())
    broken = AnswerText(chat.tokenizer)
    assert broken.add(byte_ids(chat, "€".encode()[0])[0]) == "" and broken.rest() == "\ufffd"


def byte_ids(chat: VisionChat, byte: int) -> list[int]:
    """Id of one byte in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in printable]
    symbol = chr(byte) if byte in printable else chr(256 + others.index(byte))
    assert symbol in ByteLevel.alphabet()
    vocabulary = json.loads((Path(chat.name) / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[symbol]]


def test_answer_batch__equals_questions_one_by_one(chat: VisionChat) -> None:
    images = [photo(0), None, [photo(1), photo(0)], photo(2)]
    questions = [QUESTION, "Hello?", "Which of the two images is darker, the first or the second?", "What is it?"]
    together = chat.answer_batch(images, questions, max_tokens=6)
    assert chat.turns == ()
    for given, question, answer in zip(images, questions, together, strict=True):
        chat.reset()
        shown = given if isinstance(given, list) else [] if given is None else [given]
        assert chat.ask(question, shown, max_tokens=6) == answer
    assert chat.answer_batch([], []) == []


def test_answer_batch__leaves_the_conversation_alone(chat: VisionChat) -> None:
    chat.ask(QUESTION, [photo(0)], max_tokens=2)
    chat.answer_batch([photo(1)], ["What is it?"], max_tokens=2)
    chat.ask("And the square?", max_tokens=2)
    assert chat.prefilled < 16 and len(chat.turns) == 4


def test_stop__at_the_end_of_a_turn(chat: VisionChat, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*chat.tokenizer.encode("blue"), chat.tokenizer.eos, ENDED]

    def said(model: Any, embeddings: Tensor, **options: Any) -> Any:
        assert chat.tokenizer.eos in options["stop"]
        return (torch.tensor([one] * len(embeddings)) for one in ids)

    monkeypatch.setattr("qlip.vlm.chat.complete", said)
    assert chat.ask(QUESTION) == "blue"
    assert chat.answer_batch([None, None], ["a?", "b?"]) == ["blue", "blue"]


def test_stop__at_the_text_that_ends_a_caption(
    talker: Callable[[], VisionChat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage has no token there, and a tokenizer may join the end with what stands before it."""
    chat = talker()
    monkeypatch.setattr(chat.model, "config", chat.model.config.model_copy(update={"template": "plain"}))
    plain = VisionChat(chat.model, chat.tokenizer, chat.preprocessing)

    def said(model: Any, embeddings: Tensor, **options: Any) -> Any:
        ids = chat.tokenizer.encode(" a cat.\nmore")
        return (torch.tensor([one] * len(embeddings)) for one in ids)

    monkeypatch.setattr("qlip.vlm.chat.complete", said)
    assert plain.ask("Ignored?", [photo(0)]) == "a cat."
    assert plain.answer_batch([photo(0)], ["Ignored?"]) == ["a cat."]
    plain.reset()
    with pytest.raises(QLIPError, match="plain reads images alone"):
        plain.ask("Ignored?")


def test_likelihood__is_that_of_the_training_loss(chat: VisionChat) -> None:
    conversation = Conversation("one", (photo(0),), (Turn("user", "<image>\nWhat?"), Turn("assistant", "dark blue")))
    example = encode_conversation(conversation, chat.template, chat.tokenizer, 16, NO_LIMIT)
    ids, (begin, end) = example.ids, last_labels(example.labels.tolist())
    pixels = chat._see(photo(0)).pixels[None]
    with torch.no_grad():
        hidden = chat.model.llm.hidden(chat.model.embed(ids[None], pixels))[0]
        nats = chat.model.llm.nats(hidden[begin - 1 : end - 1], ids[begin:end])
    found, greedy = chat.likelihood(conversation)
    assert found == pytest.approx(-float(nats[:-1].sum()), rel=1e-5) and not greedy
    likeliest = chat.ask("What?", [photo(0)], max_tokens=1)
    answered = Conversation("one", (photo(0),), (Turn("user", "<image>\nWhat?"), Turn("assistant", likeliest)))
    if chat.tokenizer.encode(likeliest) == chat._keys[-1:]:
        assert chat.likelihood(answered)[1]
    with pytest.raises(QLIPError, match="one: has an empty answer"):
        chat.likelihood(Conversation("one", (), (Turn("user", "What?"), Turn("assistant", ""))))


def test_settings__of_generation_config(tmp_path: Path) -> None:
    assert AnswerSettings.from_folder(tmp_path).sampling() == Sampling(temperature=0.0)
    stock = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "eos_token_id": [2, 5],
        "bos_token_id": 1,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(stock | {"transformers_version": "5.0"}))
    settings = AnswerSettings.from_folder(tmp_path)
    assert settings.sampling() == Sampling(0.6, 20, 0.9) and settings.ends == (2, 5)
    assert settings.sampling(0) == Sampling(temperature=0.0) and settings.sampling(1.0).top_p == 0.9
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(QLIPError, match=r"generation_config.json: temperature"):
        AnswerSettings.from_folder(tmp_path)


def test_ask__too_long_is_one_line_and_changes_nothing(chat: VisionChat) -> None:
    chat.ask(QUESTION, [photo(0)], max_tokens=2)
    before = chat.turns
    with pytest.raises(QLIPError, match=r"the conversation: [\d,]+ tokens with the question, and .* reads 512; start"):
        chat.ask("What about " + "this " * 1000, max_tokens=2)
    with pytest.raises(QLIPError, match="max_tokens 0"):
        chat.ask("What?", max_tokens=0)
    assert chat.turns == before
    assert chat.ask("And the square?", max_tokens=2) == chat.turns[-1].text
    with pytest.raises(QLIPError, match="question 1: "):
        chat.answer_batch([None, None], ["short?", "long " * 1000])


def test_ask__an_answer_ends_where_the_context_ends(chat: VisionChat) -> None:
    question = "x" * 470
    while len(prompt := chat._prompt(Conversation("x", (), (Turn("user", question),)))) < 508:
        question += "?"
    chat.ask(question)
    assert len(prompt) + 1 <= len(chat._keys) <= 512


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("", [], "an empty question"),
        ("one <image> or <image>?", [Image.new("RGB", (8, 8))], "2 marks <image> in the question for 1 image"),
        ("What?", ["no/such.png"], "no/such.png: no such file"),
        ("What?", "no/such.png", "no/such.png: no such file"),
        ("What?", 3, "int is not an image"),
        (None, [], "a question is a text, not None"),
    ],
)
def test_ask__wrong_input(chat: VisionChat, question: Any, images: Any, message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        chat.ask(question, images)
    assert chat.turns == ()


def test_ask__one_image_needs_no_list(chat: VisionChat) -> None:
    image = Image.effect_mandelbrot((64, 64), (-2, -2, 2, 2), 9)
    answer = chat.ask("What is it?", [image], max_tokens=4)
    chat.reset()
    assert chat.ask("What is it?", image, max_tokens=4) == answer
    with pytest.raises(QLIPError, match="max_tokens True: give an integer"):
        chat.ask("What is it?", max_tokens=True)


def test_from_pretrained__options(talker_folder: Path) -> None:
    assert VisionChat.from_pretrained(talker_folder, torch_dtype="bfloat16").model.llm.dtype == torch.bfloat16
    with pytest.raises(QLIPError, match=r"dtpye: no such option of a model \(did you mean 'dtype'"):
        VisionChat.from_pretrained(talker_folder, dtpye="bfloat16")
    with pytest.raises(QLIPError, match="dtype int32: no such type of weights"):
        VisionChat.from_pretrained(talker_folder, dtype=torch.int32)


def test_ask__single_turns_are_each_asked_alone(chat: VisionChat, talker: Callable[[], VisionChat]) -> None:
    chat.settings = AnswerSettings(single_turn=True, max_new_tokens=5)
    alone = talker()
    for question, given, shown in (
        (QUESTION, photo(0), photo(0)),
        ("And the square?", None, photo(0)),
        ("And here?", photo(1), photo(1)),
    ):
        answer = chat.ask(question, None if given is None else [given])
        assert [answer] == alone.answer_batch([shown], [question], max_tokens=5)
        assert [turn.role for turn in chat.turns] == ["user", "assistant"]
        if given is None:
            assert chat.prefilled < 16, "the image is read again"


def test_ask__marks_place_images(chat: VisionChat) -> None:
    chat.ask("Is <image> like <image>?", [photo(0), photo(1)], max_tokens=1)
    keys = [isinstance(one, str) for one in chat._keys]
    begin = keys.index(True)
    assert sum(keys) == 32 and not all(keys[begin : begin + 32])


def test_bundled_talker__sees_made_scenes() -> None:
    chat = VisionChat.from_pretrained()
    questions = list(SceneQuestions("seen").of_kind("colour", 32))
    words = [one.text for one in questions]
    seen = chat.answer_batch([one.image() for one in questions], words)
    other = chat.answer_batch([questions[0].image()] * 32, words)
    right, fixed = (sum(a == one.answer for a, one in zip(found, questions, strict=True)) for found in (seen, other))
    assert right >= 30 and fixed <= 16


def test_from_pretrained__another_models_tokenizer(talker_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(talker_folder, tmp_path / "talker")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.path(assets.BUNDLED, name), folder)
    with pytest.raises(QLIPError, match=r"its tokenizer has [\d,]+ ids, its text decoder \d+"):
        VisionChat.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(QLIPError, match="preprocessor_config.json: no such file"):
        VisionChat.from_pretrained(folder)
