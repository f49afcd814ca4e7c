"""`qlip um3`: conversations and completions of text and images."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from qlip.um3.session import UM3Chat
from tests.cli.conftest import Command, write_image
from tests.um3.conftest import um3_folder  # noqa: F401


def test_um3_chat__answers_of_a_model_and_images_as_files(
    qlip: Command,
    tmp_path: Path,
    um3_folder: Path,  # noqa: F811
) -> None:
    photo = write_image(tmp_path / "cat.png")
    command = ["um3", "chat", photo, "-m", um3_folder, "-o", tmp_path / "out", "--seed", 3, "--temperature", 0.8]
    ran = qlip(*command, "--mode", "image", "--message", "a circle", "--message", "another", "--json")
    assert ran.code == 0, ran.err
    files = [one["answer"][0]["file"] for one in ran.json["results"]]
    assert files == [str(tmp_path / "out" / "00000.png"), str(tmp_path / "out" / "00001.png")]
    chat = UM3Chat.from_pretrained(um3_folder, device="cpu")
    sampling = chat.settings.sampling(0.8)
    first = chat.say([photo, "a circle"], generation_mode="image", sampling=sampling, seed=3)
    second = chat.say("another", generation_mode="image", sampling=sampling, seed=3)
    for file, [image] in zip(files, (first, second), strict=True):
        with Image.open(file) as written:
            assert isinstance(image, Image.Image) and written.tobytes() == image.tobytes()
    ran = qlip(*command, "--mode", "image", "--message", "a square", "--json")  # a later conversation
    assert ran.json["results"][0]["answer"] == [{"file": str(tmp_path / "out" / "00002.png")}], ran.err


def test_um3_chat__a_message_that_cannot_be_answered_does_not_end_the_others(
    qlip: Command,
    um3_folder: Path,  # noqa: F811
) -> None:
    command = ["um3", "chat", "-m", um3_folder, "--mode", "text", "--max-tokens", 3, "--json"]
    ran = qlip(*command, "--message", "a", "--message", "circle " * 2000, "--message", "b")
    assert ran.code == 1 and "message 2: " in ran.err and "1 of 3 messages failed" in ran.err
    assert [one["message"] for one in ran.json["results"]] == ["a", "b"]
    assert [one["input"] for one in ran.json["failures"]] == ["message 2"]


def test_um3_chat__answers_of_text_and_images_in_one_conversation(
    qlip: Command,
    um3_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = ["um3", "chat", "-m", um3_folder, "-o", tmp_path / "out", "--temperature", 0, "--max-tokens", 300]
    ran = qlip(*command, "--message", "a red circle", "--message", "what colour?", "--json")
    chat = UM3Chat.from_pretrained(um3_folder, device="cpu")
    sampling = chat.settings.sampling(0)
    answers = [chat.say(one, max_tokens=300, sampling=sampling) for one in ("a red circle", "what colour?")]
    kinds = {type(part) is str for answer in answers for part in answer}
    assert kinds == {True, False}  # texts and images
    assert ran.code == 0 and len(ran.json["results"]) == 2, ran.err
    for one, answer in zip(ran.json["results"], answers, strict=True):
        for said, part in zip(one["answer"], answer, strict=True):
            if isinstance(part, str):
                assert said == {"text": part}
                continue
            with Image.open(said["file"]) as written:
                assert written.tobytes() == part.tobytes()


def test_um3_chat__messages_as_lines(
    qlip: Command,
    um3_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a circle\n\nwhat?\n"), encoding="utf-8"))
    ran = qlip("um3", "chat", "-m", um3_folder, "--mode", "text", "--max-tokens", 3)
    chat = UM3Chat.from_pretrained(um3_folder, device="cpu")
    said = ["".join(map(str, chat.say(one, generation_mode="text", max_tokens=3))) for one in ("a circle", "what?")]
    assert (ran.code, ran.out) == (0, "".join(one + "\n" for one in said))


def test_um3_chat__typed_lines_add_images_and_draw(
    qlip: Command,
    um3_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    photo = write_image(tmp_path / "cat.png")
    typed = iter(["/help", "/image absent.png", f"/image {photo}", "what?", "/draw a circle", "/reset", "/quit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    ran = qlip("um3", "chat", "-m", um3_folder, "--mode", "text", "--max-tokens", 2)
    assert ran.code == 0 and "absent.png" in ran.err and "[drawn/00000.png]" in ran.out


def test_um3_complete__text_or_an_image(qlip: Command, um3_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    ran = qlip("um3", "complete", "a circle", "-m", um3_folder, "--max-tokens", 4)
    chat = UM3Chat.from_pretrained(um3_folder, device="cpu")
    text = "".join(map(str, chat.say("a circle", generation_mode="text", max_tokens=4)))
    assert (ran.code, ran.out) == (0, text + "\n")
    drawn = tmp_path / "circle.png"
    ran = qlip("um3", "complete", "a circle", "-m", um3_folder, "-o", drawn, "--guidance", 2, "--json")
    assert ran.code == 0 and ran.json["file"] == str(drawn)
    with Image.open(drawn) as image:
        assert image.size == (64, 64)
    ran = qlip("um3", "complete", "--image", drawn, "-m", um3_folder, "--max-tokens", 4)
    text = "".join(map(str, chat.generate([[drawn]], generation_mode="text", max_tokens=4)[0]))
    assert (ran.code, ran.out) == (0, text + "\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["complete", "a", "-o", "a.txt"], 2, "is not an image format"),
        (
            ["complete", "a", "-o", "a.png", "--max-tokens", 9],
            1,
            "max_tokens 9 cannot hold an image, which has",
        ),
        (["chat", "--message", "a", "--max-tokens", 9], 1, "max_tokens 9 cannot hold an image"),
        (["complete", "a", "-o", "a.png", "--guidance", "much"], 1, "guidance 'much'"),
        (["complete"], 1, "an empty prompt; give some text, or an image"),
        (["complete", "a", "--guidance", 2], 2, "--guidance is of images"),
    ],
)
def test_um3__what_cannot_be_is_one_line(
    qlip: Command,
    um3_folder: Path,  # noqa: F811
    arguments: list[object],
    code: int,
    message: str,
) -> None:
    ran = qlip("um3", *arguments, "-m", um3_folder)
    assert ran.code == code and message in ran.err and len(ran.error_lines) == 1


def test_um3__another_kind_of_model_is_named(qlip: Command) -> None:
    ran = qlip("um3", "complete", "a", "-m", "qlip-talker-64")
    assert ran.code == 1 and "is no UM3, its model_type is 'qlip_vlm'; `qlip chat` is for talkers" in ran.err
    ran = qlip("draw", "a red circle", "-m", "qlip-talker-64")
    assert ran.code == 2 and "is a vision-language model, which draws nothing; ask it with qlip chat" in ran.err
