"""A conversation of text and images: one document, one cache, and prompts that stand alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qlip.errors import QLIPError
from qlip.lm.guidance import Constant
from qlip.lm.sampling import Sampling
from qlip.um3.generate import generate, stream
from qlip.um3.sequence import image_ids
from qlip.um3.session import UM3Chat, UM3Settings


@pytest.fixture(scope="module")
def loaded(um3_folder: Path) -> UM3Chat:
    return UM3Chat.from_pretrained(um3_folder, device="cpu")


@pytest.fixture
def chat(loaded: UM3Chat) -> UM3Chat:
    return UM3Chat(loaded.model, loaded.tokenizer, loaded.codec, loaded.settings, loaded.name)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((80, 70))


def pixels(image: Any) -> bytes:
    return bytes(image.tobytes())


def test_chat__every_turn_continues_one_document_and_reads_its_own_ids_alone(chat: UM3Chat, photo: Image.Image) -> None:
    cost = chat.model.config.image_length + 2
    options: dict[str, Any] = {"max_tokens": cost + 20}
    ids: list[int] = []
    turns: list[Any] = ["a red circle", [photo, "what colour?"], "and this?"]
    for number, turn in enumerate(turns):
        guidance = Constant(3.0 if number != 1 else 1.0)  # the cache has one row more, or one less
        ids = [*ids, *chat.encode(turn, ids)]
        before, given = len(chat.ids), len(ids)
        answer = chat.say(turn, guidance=guidance, seed=number, **options)
        expected = {"guidance": guidance, "sampling": chat.settings.sampling(), "seed": number, **options}
        [new] = generate(chat.model, [ids], **expected)
        assert list(map(type, chat.decode(new))) == list(map(type, answer))
        kept = list(chat.ids[given:])
        assert kept and kept == new[: len(kept)]
        assert chat.prefilled <= given - before + 1, "the conversation before it is read again"
        assert chat._cache is not None and chat._cache.capacity <= given + cost + 20 + 256, "more than the turn needs"
        ids = list(chat.ids)
    chat.model.grammar.check(torch.tensor(ids))
    assert ids.count(chat.model.config.begin_image) > 1
    chat.reset()
    assert chat.ids == []


def test_chat__draws_an_image_and_reads_it(chat: UM3Chat) -> None:
    config = chat.model.config
    [image] = chat.say("a red circle", generation_mode="image", guidance=Constant(2.0))
    assert isinstance(image, Image.Image) and image.size == (64, 64)
    drawn = torch.tensor([chat.ids[-config.image_length - 1 : -1]])
    assert chat.ids[-config.image_length - 2] == config.begin_image
    assert pixels(chat.decode_image_tokens(drawn)[0]) == pixels(image)
    text = chat.say("what is it?", generation_mode="text", max_tokens=4)
    assert all(isinstance(part, str) for part in text)


def test_chat__single_turns_see_the_last_image_and_no_earlier_text(chat: UM3Chat, photo: Image.Image) -> None:
    chat.settings = UM3Settings(single_turn=True)
    drawing: dict[str, Any] = {"generation_mode": "image", "seed": 3}
    words: dict[str, Any] = {"generation_mode": "text", "max_tokens": 4, "seed": 3}
    chat.say([photo, "what is it?"], **words)
    [drawn] = chat.say("a red circle", **drawing)
    [[alone]] = chat.generate(["a red circle"], **drawing)
    assert pixels(drawn) == pixels(alone)
    image = chat.ids[-chat.model.config.image_length - 2 :]
    for question in ("what colour?", "what shape?"):
        chat.say(question, **words)
        asked = [*image, *chat.encode(question, image)]
        assert chat.ids[: len(asked)] == asked
    assert chat.prefilled < 16, "the image is read again"


def test_chat__an_image_that_was_not_finished_is_not_kept(chat: UM3Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.say("a red circle", generation_mode="text", max_tokens=3)
    before = [*chat.ids, *chat.encode("another", chat.ids)]

    def stopped(*prompts: Any, **options: Any) -> Any:
        yield from itertools.islice(stream(*prompts, **options), 10)
        raise KeyboardInterrupt

    monkeypatch.setattr("qlip.um3.session.stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        chat.say("another", generation_mode="image")
    monkeypatch.undo()
    assert chat.ids == before
    chat.say("and?", generation_mode="text", max_tokens=2)
    chat.model.grammar.check(torch.tensor(chat.ids))


def test_chat__fault_leaves_the_conversation_as_it_was(chat: UM3Chat, tmp_path: Path) -> None:
    chat.say("a red circle", generation_mode="text", max_tokens=3)
    ids = list(chat.ids)
    with pytest.raises(QLIPError, match="absent.png"):
        chat.say([tmp_path / "absent.png", "what?"])
    with pytest.raises(QLIPError, match="max_tokens 5 cannot hold an image"):
        chat.say("draw", max_tokens=5)
    with pytest.raises(QLIPError, match="do not fit in the context"):
        chat.say("draw " * 1200, generation_mode="image")
    assert chat.ids == ids
    assert chat.say("and?", generation_mode="text", max_tokens=3)


def test_encode__images_are_the_codecs_tokens_and_texts_of_turns_are_spaced(chat: UM3Chat, photo: Image.Image) -> None:
    config = chat.model.config
    [file] = chat.codec.encode([photo])
    inner = image_ids(config, file.indices(config.group_size)).tolist()
    ids = chat.encode([photo, "red"])
    assert ids == [config.begin_image, *inner, config.end_image, *chat.tokenizer.encode("red")]
    assert chat.tokenizer.decode(chat.encode("red")) == "red"
    assert chat.tokenizer.decode(chat.encode("red", chat.encode("a"))) == " red"
    [image, text] = chat.decode(ids)
    assert text == "red" and pixels(image) == pixels(chat.codec.decode([file])[0])
    assert chat.decode(ids[:-4]) == [] and chat.decode([*chat.encode("red"), *ids[:50]]) == ["red"]


def test_generate__prompts_together_are_prompts_alone(chat: UM3Chat, photo: Image.Image) -> None:
    prompts: list[Any] = ["a red circle", [photo], [photo, "what colour?"]]
    together = chat.generate(prompts, generation_mode="text", max_tokens=6, seed=4)
    for number, prompt in enumerate(prompts):
        assert chat.generate([prompt], generation_mode="text", max_tokens=6, seed=4, numbers=[number]) == [
            together[number]
        ]


def test_generate__decodes_the_images_of_all_prompts_together_in_blocks(
    chat: UM3Chat, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = ["a red circle", [photo], "blue"]
    options: dict[str, Any] = {"generation_mode": "image", "guidance": Constant(2.0)}
    alone = [chat.generate([one], numbers=[number], **options) for number, one in enumerate(prompts)]
    sizes, decode = list[int](), chat.codec.model.decode
    monkeypatch.setattr(chat.codec.model, "decode", lambda some, grid: sizes.append(len(some)) or decode(some, grid))
    monkeypatch.setattr("qlip.um3.session.DECODED_AT_ONCE", 2)
    together = chat.generate(prompts, **options)
    assert sizes == [2, 1]
    assert [[pixels(one) for one in answer] for answer in together] == [[pixels(answer[0])] for [answer] in alone]


def test_chat__samples_as_the_paper_unless_the_folder_says_otherwise(tmp_path: Path) -> None:
    assert UM3Settings.from_folder(tmp_path).sampling() == Sampling(1.0, top_p=0.95)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5, "image_guidance_scale": 3}')
    settings = UM3Settings.from_folder(tmp_path)
    assert settings.sampling() == Sampling(1.0, top_p=0.5) and settings.image_guidance_scale == 3
    (tmp_path / "generation_config.json").write_text('{"temperature": -1.0}')
    with pytest.raises(QLIPError, match=r"generation_config.json: temperature -1.0"):
        UM3Settings.from_folder(tmp_path)


def test_chat__arguments_of_another_type(chat: UM3Chat) -> None:
    config = chat.model.config
    assert chat.guidance(2) == Constant(2)
    with pytest.raises(QLIPError, match="prompts: give a list of prompts, not a str"):
        chat.generate("hi")  # type: ignore[arg-type]
    ids = torch.zeros(1, config.image_length, dtype=torch.int64)
    wrong: list[Any] = [[[1, 2]], None, ids[0], ids[None], ids.bool(), ids.float()]
    for one in wrong:
        with pytest.raises(QLIPError, match=f"ids must be an integer tensor .B, {config.image_length}., got"):
            chat.decode_image_tokens(one)


def test_chat__another_qlip_is_refused(loaded: UM3Chat) -> None:
    model = loaded.model
    config = model.config.model_copy(update={"vision_fingerprint": "0" * 64})
    other = type(model)(config, model.decoder)
    with pytest.raises(QLIPError, match="was trained with images of the QLIP 000000000000, but qlip-nano-64 is"):
        UM3Chat(other, loaded.tokenizer, loaded.codec)
