r"""Conversations about images, and their files: LLaVA's JSON lists, and JSONL with such an item per line.

    {"id": "7", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`Conversation` is one of them, `ConversationFile` all of a file. ``image`` may be absent or a list. The text says where
each image stands, which is where the model has it: LLaVA's own loader moves the image to the front instead. Answers
before the first question are left out, as there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlip.errors import QLIPError

IMAGE = "<image>"
"""Mark of an image's place in the text of a user's turn."""
NAMED = 10
"""Items left out of a file that a message names."""
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""Values of ``from``."""


@dataclass(frozen=True)
class Turn:
    """Text of one side, or of the system."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns, with the images that they speak of.

    Attributes:
        id: for messages.
        images: in the order of their marks in the users' turns: paths relative to a folder, or Pillow images.
        turns: a system turn may come first.
    """

    id: str
    images: tuple[Any, ...]
    turns: tuple[Turn, ...]

    def check(self) -> None:
        """Check order and image marks.

        Raises:
            QLIPError: no turn, a system turn that is not the first, or more or fewer marks than images.
        """
        if not self.turns:
            raise QLIPError(f"{self.id}: has no question")
        if any(turn.role == "system" for turn in self.turns[1:]):
            raise QLIPError(f"{self.id}: a system turn that is not the first")
        marks = sum(turn.text.count(IMAGE) for turn in self.turns if turn.role == "user")
        if marks != len(self.images):
            raise QLIPError(
                f"{self.id}: {IMAGE} stands {marks} times in its questions, but it has {len(self.images)} images"
            )


@dataclass(frozen=True)
class BrokenItem:
    """An item of a file that is no conversation; `where` is its id, line or place, `reason` one line."""

    where: str
    reason: str


class ConversationFile(Sequence[Conversation]):
    """The conversations of a file; an item is read when it is asked for, so worker processes need no copy of all.

    Attributes:
        path: of the file, which must stay as it is.
        broken: items that are left out.
        has_images: bool, for each conversation.
        fingerprint: hash of the conversations.

    Args:
        path: a JSON list, or JSONL.

    Raises:
        QLIPError: no such file, not UTF-8, not a JSON list, or no item is a conversation.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.broken: list[BrokenItem] = []
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise QLIPError(f"{self.path}: {error.strerror or error}; give LLaVA's JSON or JSONL") from None
        spans, places = list[tuple[int, int]](), list[str]()
        images, digest = list[bool](), hashlib.sha256()
        for place, begin, end in self._items(data):
            item = data[begin:end]
            try:
                found = parse_conversation(json.loads(item), place)
            except QLIPError as error:
                self.broken.append(BrokenItem(place, str(error)))
            except (ValueError, RecursionError):  # also for bytes that are not UTF-8, and brackets without end
                self.broken.append(BrokenItem(place, f"{place}: not JSON"))
            else:
                spans.append((begin, end))
                places.append(place)
                images.append(bool(found.images))
                digest.update(item)
        if not spans:
            first = f"; {self.broken[0].reason}" if self.broken else ""
            raise QLIPError(f"{self.path}: holds no conversation{first}")
        self._spans = np.array(spans)  # (n, 2)
        self._places = np.array(places, "S")  # in the file, such as b"item 3"
        self.has_images = np.array(images)
        self.fingerprint = digest.hexdigest()[:16]

    def _items(self, data: bytes) -> Iterator[tuple[str, int, int]]:
        """Iterate over the items' places, and where they begin and end in the file."""
        begin = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        if data[begin:].lstrip()[:1] == b"[":
            try:
                for number, span in enumerate(_items_of_list(data.decode("latin-1"), data.index(b"[") + 1)):
                    yield f"item {number}", *span
            except (ValueError, RecursionError) as error:
                raise QLIPError(f"{self.path}: not JSON ({error}); write it again") from None
            return
        for number, line in enumerate(data[begin:].split(b"\n"), start=1):
            if number == 1 and line.strip() and b"{" not in line[:100]:
                raise QLIPError(f"{self.path}: neither a JSON list of conversations nor JSONL with one per line")
            if line.strip():
                yield f"line {number}", begin, begin + len(line)
            begin += len(line) + 1

    @cached_property
    def _data(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_data"}

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._spans[index].tolist()
        return parse_conversation(json.loads(self._data[begin:end]), self._places[index].decode())

    def summary(self) -> str | None:
        """Say how many items are left out, which and why; None if none is. At most `NAMED` are named."""
        if not self.broken:
            return None
        total, more = len(self) + len(self.broken), len(self.broken) - NAMED
        named = [one.reason for one in self.broken[:NAMED]] + [f"and {more:,} more"] * (more > 0)
        return f"{self.path}: {len(self.broken):,} of {total:,} items left out: {'; '.join(named)}"


def _items_of_list(text: str, place: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each item of a JSON list.

    Args:
        text: a character per byte, so that places count bytes.
        place: behind the opening bracket.

    Raises:
        ValueError: not JSON.
    """
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    place = end = space.match(text, place).end()  # type: ignore[union-attr]
    while text[end : end + 1] != "]":
        _, end = decode(text, place)
        yield place, end
        end = space.match(text, end).end()  # type: ignore[union-attr]
        if text[end : end + 1] not in ("]", ","):
            raise ValueError(f"neither a comma nor the end of the list at byte {end}")
        place = space.match(text, end + 1).end()  # type: ignore[union-attr]
    if text[end + 1 :].strip(" \t\r\n"):
        raise ValueError(f"more behind the end of the list at byte {end}; is it two files in one?")


def parse_conversation(item: Any, place: str) -> Conversation:
    """Make a conversation of an item of LLaVA's JSON.

    Args:
        item: parsed JSON.
        place: in the file, for errors, and the name of an item without an id.

    Raises:
        QLIPError: a key is missing or of another type, or the marks do not fit the images.
    """
    if not isinstance(item, dict):
        raise QLIPError(f"{place}: not an object with id, image and conversations")
    name = str(item.get("id", place))
    where = place if name == place else f"{place} ({name})"
    images, turns = item.get("image") or [], item.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise QLIPError(f"{where}: image is neither a path nor a list of paths")
    if not isinstance(turns, list):
        raise QLIPError(f"{where}: has no list of conversations")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
            raise QLIPError(f"{where}: a turn is not {{from: human or gpt, value: text}}")
    said = [Turn(ROLES[turn["from"]], turn["value"]) for turn in turns]
    begin = next((number for number, turn in enumerate(said) if turn.role != "assistant"), len(said))
    found = Conversation(name, tuple(images), tuple(said[begin:]))
    try:
        found.check()
    except QLIPError as error:
        raise QLIPError(f"{place}: {error}" if where != place else str(error)) from None
    return found
