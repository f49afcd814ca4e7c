"""`qlip chat`: questions as options, as lines and from the keyboard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from qlip.cli.image import chat as chat_command
from qlip.modeling.images import load_image
from qlip.vlm.chat import VisionChat
from tests.cli.conftest import Command, write_image
from tests.vlm.conftest import talker_folder  # noqa: F401


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Questions, images and settings that a chat was asked; answers repeat the question."""
    found: list[tuple[str, list[Any], dict[str, Any]]] = []

    def stream(self: Any, question: str, images: Any = None, **settings: Any) -> Any:
        found.append((question, [Path(one).name for one in images or ()], settings))
        return iter([question[:2], question[2:]])

    monkeypatch.setattr(VisionChat, "stream", stream)
    monkeypatch.setattr(VisionChat, "from_pretrained", lambda name, **options: object.__new__(VisionChat))
    monkeypatch.setattr(VisionChat, "name", "talker", raising=False)
    return found


class Terminal(io.TextIOWrapper):
    """Stdin with a person behind it."""

    def isatty(self) -> bool:
        return True


def lines(text: str, terminal: bool = False) -> io.TextIOWrapper:
    return (Terminal if terminal else io.TextIOWrapper)(io.BytesIO(text.encode()), encoding="utf-8")


def test_chat__answers_of_a_model(qlip: Command, photos: Path, talker_folder: Path) -> None:  # noqa: F811
    command = ["chat", photos / "cat.png", photos / "dog.jpg", "-m", talker_folder, "--max-tokens", 5, "--json"]
    ran = qlip(*command, "--question", "What colour is it?", "--question", "And the other?")
    assert ran.code == 0, ran.err
    chat = VisionChat.from_pretrained(talker_folder, device="cpu")
    first = chat.ask("What colour is it?", [photos / "cat.png", photos / "dog.jpg"], max_tokens=5)
    second = chat.ask("And the other?", max_tokens=5)
    assert [one["answer"] for one in ran.json["results"]] == [first, second]
    assert [Path(one).name for one in ran.json["images"]] == ["cat.png", "dog.jpg"]


def test_chat__questions_as_options_share_the_images(qlip: Command, photos: Path, asked: list[Any]) -> None:
    ran = qlip(
        "chat",
        photos / "cat.png",
        "-m",
        "talker",
        "--question",
        "first?",
        "--question",
        "second?",
        "--temperature",
        0.5,
    )
    assert (ran.code, ran.out) == (0, "first?\nsecond?\n")
    settings = {"max_tokens": None, "temperature": 0.5, "seed": 0}
    assert asked == [("first?", ["cat.png"], settings), ("second?", [], settings)]


def test_chat__questions_as_lines(qlip: Command, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", lines("naïve?\n\n  second? \n"))
    assert qlip("chat", "-m", "talker").out == "naïve?\nsecond?\n"
    monkeypatch.setattr("sys.stdin", lines(" \n"))
    ran = qlip("chat", "-m", "talker")
    assert ran.code == 2 and "no question" in ran.err


def test_chat__on_the_keyboard(
    qlip: Command, photos: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_image(tmp_path / "one more.png")
    resets: list[int] = []
    monkeypatch.setattr(VisionChat, "reset", lambda self: resets.append(len(asked)))
    monkeypatch.setattr(VisionChat, "load", lambda self, image: load_image(image))
    typed = [
        "first?",
        "",
        f"/image {tmp_path / 'one more.png'}",
        "second?",
        "/reset",
        "third?",
        "/unknown",
        "/image",
        "/quit",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", lines("\n".join(typed) + "\n", terminal=True))
    monkeypatch.setattr("builtins.input", lambda prompt: next(keyboard))
    keyboard = iter(typed)
    ran = qlip("chat", photos / "cat.png", "-m", "talker")
    assert ran.code == 0
    shown = [(question, images) for question, images, _ in asked]
    assert shown == [("first?", ["cat.png"]), ("second?", ["one more.png"]), ("third?", ["cat.png"])]
    assert resets == [2] and ran.err.count(chat_command.HELP) == 3


def test_chat__an_error_ends_a_question_not_the_conversation(
    qlip: Command,
    talker_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = ["/image no/such.png", "long " * 900, "short?"]

    def typed(prompt: str) -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    monkeypatch.setattr("sys.stdin", lines("", terminal=True))
    monkeypatch.setattr("builtins.input", typed)
    ran = qlip("chat", "-m", talker_folder, "--max-tokens", 3)
    assert ran.code == 0
    assert "no/such.png: no such file" in ran.err and "start again" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such.png", "--question", "What?"], 2, "no/such.png: no such file"),
        (["--question", "What?", "-m", "no/such/folder"], 1, "no/such/folder: no such folder"),
        (["--question", "What?", "-m", "qlip-nano-64"], 1, "is no vision-language model"),
        (["--question", "What?", "-m", "qlip-um3-64"], 1, "a UM3 answers with `qlip um3 chat`"),
        (["--question", "What?", "-m", ""], 1, "the name of the model is empty"),
        (["", "--question", "What?"], 2, "without a name"),
    ],
)
def test_chat__wrong_input_is_one_line(qlip: Command, arguments: list[str], code: int, message: str) -> None:
    ran = qlip("chat", *arguments)
    assert ran.code == code and message in ran.err and len(ran.error_lines) == 1, ran.err


def test_chat__a_question_that_cannot_be_answered_does_not_end_the_others(
    qlip: Command,
    photos: Path,
    talker_folder: Path,  # noqa: F811
) -> None:
    questions = [
        one for text in ("<image><image> what?", "What is it?", "<image> and?") for one in ("--question", text)
    ]
    ran = qlip("chat", photos / "cat.png", "-m", talker_folder, "--max-tokens", 3, "--json", *questions)
    assert ran.code == 1 and "question 1: 2 marks <image>" in ran.err and "2 of 3 questions failed" in ran.err
    assert [one["question"] for one in ran.json["results"]] == ["What is it?"]
    chat = VisionChat.from_pretrained(talker_folder, device="cpu")
    assert ran.json["results"][0]["answer"] == chat.ask("What is it?", photos / "cat.png", max_tokens=3)
    assert [one["input"] for one in ran.json["failures"]] == ["question 1", "question 3"]


def test_chat__images_of_equal_names(qlip: Command, photos: Path, tmp_path: Path, asked: list[Any]) -> None:
    write_image(tmp_path / "other" / "cat.png")
    images = [photos / "cat.png", tmp_path / "other" / "cat.png", photos / "cat.png"]
    assert qlip("chat", *images, "--question", "Which?").code == 0
    assert asked[0][1] == ["cat.png"] * 3


def test_chat__without_stdin(qlip: Command, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # as after <&-
    ran = qlip("chat")
    assert ran.code == 2 and "no question; give --question" in ran.err


def test_chat__json_needs_questions(qlip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", lines("", terminal=True))
    ran = qlip("chat", "--json")
    assert ran.code == 2 and "--json needs questions" in ran.err
