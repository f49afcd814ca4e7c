"""Labelled datasets in the layouts in which ImageNet-1k is stored."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.labelled import ClassTars, LabelList, open_labelled
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError

from ..samples import encoded, write_tar

TENCH, GOLDFISH, CRANE = "n01440764", "n01443537", "n03126707"


def labels(source: CaptionedImages) -> list[str | None]:
    return [source.read(index).label for index in range(len(source))]


def test_class_folders__labels_are_folder_names(tmp_path: Path) -> None:
    for number, wnid in enumerate((CRANE, TENCH, TENCH)):
        (tmp_path / wnid).mkdir(exist_ok=True)
        (tmp_path / wnid / f"{wnid}_{number}.JPEG").write_bytes(encoded(number, "jpeg"))
    source = open_labelled(str(tmp_path), "imagenet")
    assert labels(source) == [TENCH, TENCH, CRANE] and source.read(0).image == encoded(1, "jpeg")
    assert open_path(str(tmp_path)).read(0).label is None, "for training, a folder's name means nothing"
    (tmp_path / "n01440765").mkdir()
    (tmp_path / "n01440765" / "x.png").write_bytes(encoded(0))
    assert labels(open_labelled(str(tmp_path)))[2] == "n01440765"
    with pytest.raises(QLIPError, match=r"n01440765/: 'n01440765' is no class of imagenet \(did you mean 'n0144076"):
        open_labelled(str(tmp_path), "imagenet")
    (tmp_path / "loose.png").write_bytes(encoded(0))
    with pytest.raises(QLIPError, match=r"loose\.png is in no class folder"):
        open_labelled(str(tmp_path))


def shard(tmp_path: Path, *samples: tuple[str, dict[str, bytes]]) -> str:
    files = [(f"{key}.{kind}", data) for key, some in samples for kind, data in some.items()]
    return str(write_tar(tmp_path / "set-00.tar", files))


def test_class_tars__numbers_in_json(tmp_path: Path) -> None:
    some = [(f"{n:04d}", {"jpg": encoded(n, "jpeg"), "json": json.dumps({"label": n}).encode()}) for n in (1, 0)]
    path = shard(tmp_path, *some)
    source = open_labelled(path, "imagenet")
    assert labels(source) == [GOLDFISH, TENCH] == labels(pickle.loads(pickle.dumps(source)))
    with pytest.raises(QLIPError, match="the class number 1 has no name; give a class table"):
        open_labelled(path)
    assert source.read(0).image == encoded(1, "jpeg")


def test_class_tars__cls_files_or_ids_in_keys(tmp_path: Path) -> None:
    path = shard(
        tmp_path, ("a", {"jpg": encoded(0, "jpeg"), "cls": b"517"}), ("b", {"jpg": encoded(1, "jpeg"), "cls": b"0\n"})
    )
    assert labels(open_labelled(path, "imagenet")) == [CRANE, TENCH]
    path = shard(tmp_path, (f"{TENCH}_10", {"png": encoded(0)}), (f"train/{CRANE}/{CRANE}_2", {"png": encoded(1)}))
    assert labels(open_labelled(path)) == [TENCH, CRANE]
    path = shard(tmp_path, ("cats/1", {"png": encoded(0)}), ("dogs/1", {"png": encoded(1)}))
    assert labels(open_labelled(path)) == ["cats", "dogs"]
    # a .cls file goes before the name of a folder
    inside = open_labelled(shard(tmp_path, ("images/a", {"jpg": encoded(0, "jpeg"), "cls": b"517"})), "imagenet")
    assert labels(inside) == [CRANE]
    with pytest.raises(QLIPError, match="has no class: no label in a JSON file, no .cls file"):
        open_labelled(shard(tmp_path, ("1", {"png": encoded(0)})))
    named = open_labelled(shard(tmp_path, ("x", {"png": encoded(0), "cls": b"cat"})))
    assert named.read(0).label == named.label(0) == "cat"
    with pytest.raises(QLIPError, match="class 1000 of imagenet's 1,000; numbers run from 0"):
        open_labelled(shard(tmp_path, ("x", {"png": encoded(0), "cls": b"1000"})), "imagenet")
    with pytest.raises(QLIPError, match="labels are only read from local tars"):
        ClassTars("s3://bucket/x.tar")


def test_label_list__for_a_flat_folder(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(3):
        (folder / f"ILSVRC2012_val_{number:08d}.png").write_bytes(encoded(number))
    file = tmp_path / "labels.txt"
    file.write_text(f"{CRANE}\n{TENCH}\n{TENCH}\n\n")
    assert labels(open_labelled(str(folder), "imagenet", str(file))) == [CRANE, TENCH, TENCH]
    file.write_text("517\n0\n1\n")
    assert labels(open_labelled(str(folder), "imagenet", str(file))) == [CRANE, TENCH, GOLDFISH]
    for text, message in (
        (f"{CRANE}\n{TENCH}\n", r"labels\.txt: 2 labels for the 3 images of .*val; write one per line"),
        (f"{CRANE}\n\n{TENCH}\n", "line 2: is empty; each image needs a label"),
        (f"{CRANE}\n{TENCH}\nn0144\n", "line 3: 'n0144' is no class of imagenet"),
        ("517\n1000\n1\n", "line 2: class 1000 of imagenet's 1,000"),
    ):
        file.write_text(text)
        with pytest.raises(QLIPError, match=message):
            open_labelled(str(folder), "imagenet", str(file))
    file.write_text("0\n1\n2\n")
    with pytest.raises(QLIPError, match="line 1: the class number 0 has no name"):
        LabelList(open_path(str(folder)), file)
