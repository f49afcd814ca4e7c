"""`qlip describe`: captions of a folder, continued where a stopped command left it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qlip.cli.image import describe as describe_command
from qlip.data.sources.folder import FolderImages
from qlip.modeling.processor import Preprocessing
from qlip.vlm.chat import VisionChat
from tests.cli.conftest import Command, write_image
from tests.modeling.test_images import icc_profile
from tests.vlm.conftest import talker_folder  # noqa: F401

NAMES = ["cat.png", "dog.jpg", "sea/ship.webp"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were described; a caption tells the batch and its place."""
    found: list[int] = []

    def answer_batch(self: Any, images: list[Any], questions: list[str], **settings: Any) -> list[str]:
        found.append(len(images))
        return [f"{questions[0]} {len(found)}.{place}" for place in range(len(images))]

    monkeypatch.setattr(VisionChat, "from_pretrained", lambda name, **options: object.__new__(VisionChat))
    monkeypatch.setattr(VisionChat, "answer_batch", answer_batch)
    use(monkeypatch, Preprocessing((64, 64), 64))
    return found


def use(monkeypatch: pytest.MonkeyPatch, preprocessing: Preprocessing) -> None:
    monkeypatch.setattr(VisionChat, "load", lambda self, image: preprocessing.load(image))


def test_describe__captions_that_training_reads(
    qlip: Command,
    photos: Path,
    talker_folder: Path,  # noqa: F811
) -> None:
    ran = qlip("describe", photos, "-m", talker_folder, "--max-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["images"], ran.json["written"], ran.json["kept"]) == (3, 3, 0)
    found = rows(photos / "captions.jsonl")
    assert sorted(row["file_name"] for row in found) == NAMES
    chat = VisionChat.from_pretrained(talker_folder, device="cpu")
    images = [photos / row["file_name"] for row in found]
    assert [row["text"] for row in found] == chat.answer_batch(images, ["Describe the image."] * 3, max_tokens=4)
    source = FolderImages(photos)
    assert {source.key(index): source.read(index).captions for index in range(3)} == {
        row["file_name"]: (row["text"],) for row in found
    }


def test_describe__continues_a_stopped_command(
    qlip: Command, photos: Path, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = VisionChat.answer_batch, list[int]()

    def stopped(self: Any, images: Any, questions: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, images, questions, **settings)

    monkeypatch.setattr(VisionChat, "answer_batch", stopped)
    command = ["describe", photos, "--batch-size", 1, "-m", "talker", "--question", "Q?"]
    ran = qlip(*command)
    assert ran.code == 130 and "finished captions are kept" in ran.err
    before = (photos / "captions.jsonl").read_bytes()
    assert len(rows(photos / "captions.jsonl")) == 2
    ran = qlip(*command)
    assert ran.code == 0 and "1 caption in" in ran.out and "has captions of 2 images" in ran.err
    assert (photos / "captions.jsonl").read_bytes().startswith(before)
    assert sorted(row["file_name"] for row in rows(photos / "captions.jsonl")) == NAMES
    count = len(described)
    assert "0 captions in" in qlip(*command).out and len(described) == count


@pytest.mark.parametrize("tail", ['{"file_name": "dog.jpg", "te', '{"file_name": "dog.jpg", "text": "a dog"}'])
def test_describe__a_line_that_a_kill_cut_off(qlip: Command, photos: Path, described: list[int], tail: str) -> None:
    (photos / "captions.jsonl").write_text('{"image": "cat.png", "caption": "mine"}\n' + tail)
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 0, ran.err
    found = rows(photos / "captions.jsonl")
    assert found[0] == {"image": "cat.png", "caption": "mine"}
    assert [row.get("file_name") for row in found[1:]] in (["dog.jpg", "sea/ship.webp"], ["sea/ship.webp", "dog.jpg"])
    assert described == ([2] if tail.endswith("te") else [1])
    assert ("its last line was cut off and is removed: " + tail in ran.err) == tail.endswith("te")


def test_describe__an_image_that_cannot_be_read_is_named(qlip: Command, photos: Path, described: list[int]) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    ran = qlip("describe", photos, "-m", "talker", "-o", "new/captions.jsonl", "--json")
    assert ran.code == 1 and "broken.png: not an image" in ran.err and "1 of 4 images failed" in ran.err
    assert ran.json["written"] == 3 and len(ran.json["failures"]) == 1
    assert sorted(row["file_name"] for row in rows(Path("new/captions.jsonl"))) == NAMES
    assert not (photos / "captions.jsonl").exists()


@pytest.mark.parametrize(("profiles", "colour"), [("ignore", (200, 80, 20)), ("convert", (20, 80, 200))])
def test_describe__colours_as_the_model_reads_them(
    qlip: Command, tmp_path: Path, described: list[int], monkeypatch: pytest.MonkeyPatch, profiles: Any, colour: Any
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), (200, 80, 20)).save(
        tmp_path / "photos" / "swapped.png", icc_profile=icc_profile(swap=True)
    )
    shown: list[Image.Image] = []

    def answer_batch(self: Any, images: list[Image.Image], questions: list[str], **settings: Any) -> list[str]:
        shown.extend(images)
        return [""] * len(images)

    monkeypatch.setattr(VisionChat, "answer_batch", answer_batch)
    use(monkeypatch, Preprocessing((64, 64), 64, color_profiles=profiles))
    ran = qlip("describe", tmp_path / "photos", "-m", "talker")
    assert ran.code == 0, ran.err
    assert shown[0].getpixel((4, 4)) == pytest.approx(colour, abs=8)


def test_describe__a_broken_line_is_refused_and_stays(qlip: Command, photos: Path, described: list[int]) -> None:
    text = 'not json\n{"file_name": "cat.png", "te'
    (photos / "captions.jsonl").write_text(text)
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 1 and "captions.jsonl line 1: not valid json" in ran.err
    (photos / "captions.jsonl").write_text('{"text": "of nothing"}\n')
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 1 and "line 1: names no image" in ran.err and described == []
    (photos / "captions.jsonl").write_text("my notes, without an end of line")
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 1 and "its last line is no caption" in ran.err and described == []
    assert (photos / "captions.jsonl").read_text() == "my notes, without an end of line"


def test_describe__a_line_without_a_caption_is_none(qlip: Command, photos: Path, described: list[int]) -> None:
    (photos / "captions.jsonl").write_text('{"file_name": "cat.png"}\n{"file_name": "dog.jpg", "text": ""}\n')
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 0 and "3 captions in" in ran.out and described == [3]


def test_describe__images_of_equal_names(qlip: Command, photos: Path, described: list[int]) -> None:
    for name in ("cat.jpg", "cat.jpg.png"):
        write_image(photos / name)
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 0 and "5 captions in" in ran.out and "suffix" not in ran.err


def test_describe__a_full_disk_is_named(
    qlip: Command, photos: Path, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(describe_command, "flush", full)
    ran = qlip("describe", photos, "-m", "talker")
    assert ran.code == 1 and "captions.jsonl: No space left on device; finished captions are kept" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "no/such: no such folder"),
        (["PHOTOS", "-o", "captions.csv"], "must end in .jsonl"),
    ],
)
def test_describe__wrong_input_is_one_line(qlip: Command, photos: Path, arguments: list[str], message: str) -> None:
    ran = qlip("describe", *(photos if one == "PHOTOS" else one for one in arguments))
    assert ran.code == 2 and message in ran.err
    assert not (photos / "captions.jsonl").exists()
