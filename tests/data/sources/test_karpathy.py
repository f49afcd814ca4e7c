"""COCO and Flickr30k in Karpathy's layout, made of the package's own images."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlip import assets
from qlip.data.sources.karpathy import KarpathyImages
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError

IMAGES = ("cat", "dog", "coffee", "rocket")


SPLITS = ("train", "test", "restval", "test")


def layout(folder: Path, coco: bool, images: str = "") -> Path:
    """``dataset_coco.json`` with images in folders of years, or ``dataset_flickr30k.json`` with all in one."""
    entries: list[dict[str, Any]] = []
    for number, (name, split) in enumerate(zip(IMAGES, SPLITS, strict=True)):
        sentences = [
            {
                "tokens": ["a", name],
                "raw": f"A {name}  number {turn % 4}.",
                "imgid": number,
                "sentid": 5 * number + turn,
            }
            for turn in range(5)
        ]
        entry: dict[str, Any] = {"filename": f"{name}.jpg", "imgid": number, "split": split, "sentences": sentences}
        entry["sentids"] = [sentence["sentid"] for sentence in sentences]
        if coco:
            entry |= {"filepath": "val2014", "cocoid": 100 + number}
        place = folder / images / entry.get("filepath", "") / entry["filename"]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(assets.path("images", f"{name}.jpg"), place)
        entries.append(entry)
    name = "coco" if coco else "flickr30k"
    path = folder / f"dataset_{name}.json"
    path.write_text(json.dumps({"images": entries, "dataset": name}))
    return path


@pytest.mark.parametrize(("coco", "images"), [(True, ""), (True, "images"), (False, "flickr30k-images"), (False, "")])
def test_open_karpathy__a_split_with_all_captions(coco: bool, images: str, tmp_path: Path) -> None:
    path = layout(tmp_path, coco, images)
    source = open_path(f"{path}:test")
    assert source.name == f"{path}:test" and len(source) == 2
    first, last = source.read(0), pickle.loads(pickle.dumps(source)).read(1)
    assert first.key == ("val2014/dog.jpg" if coco else "dog.jpg") == source.key(0)
    assert first.captions == tuple(f"A dog number {turn}." for turn in range(4)) and first.label is None
    assert first.image == assets.path("images", "dog.jpg").read_bytes()
    assert last.captions[0] == "A rocket number 0."
    assert [raw.key for raw in map(open_path(str(path)).read, range(2))] == [first.key, last.key]
    assert len(open_path(f"{path}:restval")) == 1


def test_karpathy_images__in_another_folder(tmp_path: Path) -> None:
    path = layout(tmp_path / "one", coco=True)
    moved = tmp_path / "two"
    moved.mkdir()
    path = path.rename(moved / path.name)
    assert len(KarpathyImages(path, images=tmp_path / "one")) == 2
    with pytest.raises(QLIPError, match=r"its image val2014/dog\.jpg is not in .*; put the images or a link"):
        KarpathyImages(path)


def test_open_karpathy__errors_are_one_line(tmp_path: Path) -> None:
    path = layout(tmp_path, coco=False)
    with pytest.raises(QLIPError, match=r"no split 'tests' \(did you mean 'test'\?\); it has restval, test, train"):
        open_path(f"{path}:tests")
    with pytest.raises(QLIPError, match=r"none\.json: No such file"):
        open_path(str(tmp_path / "none.json"))
    for text, message in (
        ("{", "no json; give a file such as dataset_coco.json"),
        ("[]", "has no list 'images'"),
        (
            '{"images": [{"split": "test", "filename": "x.jpg"}]}',
            "the entry of 'x.jpg' lacks 'filename' or 'sentences'",
        ),
        (
            '{"images": [{"split": "test", "filename": "../x.jpg", "sentences": []}]}',
            "leads out of the folder of the images",
        ),
    ):
        path.write_text(text)
        with pytest.raises(QLIPError, match=message):
            open_path(str(path))
    path = layout(tmp_path, coco=False)
    source = open_path(str(path))
    (tmp_path / "dog.jpg").unlink()
    with pytest.raises(QLIPError, match=r"dog\.jpg: No such file"):
        source.read(0)


def test_open_karpathy__a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dataset_coco.json")
    with pytest.raises(QLIPError, match=r"dataset_coco\.json: not a regular file but a pipe"):
        open_path(f"{tmp_path}/dataset_coco.json")
