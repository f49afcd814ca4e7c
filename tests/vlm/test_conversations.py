"""Files of conversations: LLaVA's JSON and JSONL, and what is wrong with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from qlip import QLIPError
from qlip.vlm.conversations import IMAGE, Conversation, ConversationFile, Turn

ASKED = {"from": "human", "value": f"{IMAGE}\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "Ein Kätzchen \N{CAT FACE}."}
ITEM: dict[str, Any] = {"id": "7", "image": "cat.jpg", "conversations": [ASKED, ANSWER]}
FOUND = Conversation("7", ("cat.jpg",), (Turn("user", ASKED["value"]), Turn("assistant", ANSWER["value"])))


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("lines", [True, False])
def test_conversation_file__reads_lists_and_lines(tmp_path: Path, lines: bool, escaped: bool, mark: bool) -> None:
    items = [ITEM, {"conversations": [{"from": "human", "value": "Hi"}, ANSWER]}, ITEM | {"image": ["cat.jpg"]}]
    text = [json.dumps(one, ensure_ascii=escaped) for one in items]
    path = tmp_path / "file"
    path.write_text("\n".join(text) + "\n" if lines else json.dumps(items, ensure_ascii=escaped), encoding="utf-8")
    if mark:  # as some editors write it
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    file = pickle.loads(pickle.dumps(ConversationFile(path)))
    assert file.has_images.tolist() == [True, False, True]
    assert [file[0], file[2]] == [FOUND, FOUND] and len(file) == 3 and file.summary() is None
    assert file[1].images == () and file[1].id == ("line 2" if lines else "item 1")
    with pytest.raises(IndexError):
        file[3]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not an object with id, image and conversations"),
        ({"id": 8}, "(8): has no list of conversations"),
        (ITEM | {"image": 3}, "(7): image is neither a path nor a list of paths"),
        (
            ITEM | {"conversations": [{"from": "cat", "value": ""}]},
            "(7): a turn is not {from: human or gpt, value: text}",
        ),
        (ITEM | {"conversations": [{"from": "gpt"}]}, "(7): a turn is not {from: human or gpt, value: text}"),
        (ITEM | {"conversations": []}, "7: has no question"),
        (ITEM | {"image": None}, "7: <image> stands 1 times in its questions, but it has 0 images"),
        (ITEM | {"conversations": [ANSWER]}, "7: has no question"),
        (
            ITEM | {"conversations": [ANSWER, {"from": "human", "value": "What?"}]},
            "7: <image> stands 0 times in its questions, but it has 1 images",
        ),
    ],
)
def test_conversation_file__broken_items_are_counted_and_named(tmp_path: Path, item: Any, reason: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps([ITEM, item]))
    file = ConversationFile(path)
    assert [one.where for one in file.broken] == ["item 1"] and list(file) == [FOUND]
    assert file.broken[0].reason.startswith("item 1") and file.broken[0].reason.endswith(reason)
    path.write_text(json.dumps([item]))
    with pytest.raises(QLIPError, match=r"file.json: holds no conversation; item 0"):
        ConversationFile(path)


def test_conversation_file__broken_lines_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(
        b"\n".join([json.dumps(ITEM).encode(), b"", b'{"id": 3', json.dumps(ITEM).encode(), b'{"\xff": 3}'])
    )
    file = ConversationFile(path)
    assert len(file) == 2
    assert [(one.where, one.reason) for one in file.broken] == [
        ("line 3", "line 3: not JSON"),
        ("line 5", "line 5: not JSON"),
    ]
    assert file.summary() == f"{path}: 2 of 4 items left out: line 3: not JSON; line 5: not JSON"
    nameless = {name: one for name, one in ITEM.items() if name != "id"}
    path.write_text(json.dumps([3] * 12 + [nameless]))
    file = ConversationFile(path)
    assert file[0].id == "item 12"  # in the file, not among those that are left
    summary = file.summary()
    assert summary is not None and summary.count("; ") == 10 and summary.endswith("; and 2 more")


def test_conversation_file__answers_before_the_first_question_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps([ITEM | {"conversations": [ANSWER, ASKED, ANSWER]}]))
    assert list(ConversationFile(path)) == [FOUND]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "not JSON .*write it again"),
        (b"[]", "holds no conversation"),
        (b"[ ]", "holds no conversation"),
        (b"[{} {}]", "neither a comma nor the end of the list at byte 4"),
        (b"[{}][{}]", "more behind the end of the list at byte 3; is it two files in one"),
        (b"[" * 100_000, "not JSON .*write it again"),
        (b"[] {}", "more behind the end of the list"),
        (b"[{},", "not JSON .*write it again"),
        (b'[{"id": "\xff"}]', "holds no conversation; item 0: not JSON"),
        (b"", "holds no conversation"),
        (b'"text"', "neither a JSON list of conversations nor JSONL"),
        (b"id,image\n1,2\n", "neither a JSON list of conversations nor JSONL"),
        (b'{"data": []}', "holds no conversation; line 1: has no list of conversations"),
        (b'{"data":\n[]}', "holds no conversation; line 1: not JSON"),
    ],
)
def test_conversation_file__other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(QLIPError, match=message):
        ConversationFile(tmp_path / "file")


def test_conversation_file__no_such_file(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="absent.json: No such file or directory; give LLaVA's JSON or JSONL"):
        ConversationFile(tmp_path / "absent.json")
