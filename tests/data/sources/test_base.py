"""Annotations that cannot be used as they are; stamps, which tell that an image or its annotation was replaced."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip.data import FolderImages
from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.sources.base import Annotation, CaptionedImages, RawSample, annotation_of, read_json, read_text
from qlip.data.sources.classes import ClassTable
from qlip.data.sources.labelled import ClassTars, LabelList
from qlip.data.sources.parquet import ParquetImages
from qlip.data.sources.tars import TarImages
from qlip.modeling import Preprocessing

from ..samples import encoded, write_tar

Made = tuple[Callable[[], CaptionedImages], Path]
"""How to open a source, and the file that holds its first image."""


def folder(path: Path) -> Made:
    for number in range(2):
        (path / f"{number}.png").write_bytes(encoded(number))
    return lambda: FolderImages(path), path / "0.png"


def labelled(path: Path) -> Made:
    (path / "labels.txt").write_text("cat\ndog\n")
    opened, file = folder(path)
    return lambda: LabelList(opened(), path / "labels.txt"), file


def tars(path: Path) -> Made:
    shards = [write_tar(path / f"{n}.tar", [(f"{n}.png", encoded(n))]) for n in range(2)]
    return lambda: TarImages([str(one) for one in shards]), Path(shards[0])


def tables(path: Path) -> Made:
    for number in range(2):
        pq.write_table(pa.table({"image": [encoded(number)]}), path / f"{number}.parquet")
    return lambda: ParquetImages(path / "*.parquet"), path / "0.parquet"


def karpathy(path: Path) -> Made:
    from qlip.data.sources.karpathy import KarpathyImages

    entries = [{"filename": f"{n}.png", "split": "test", "sentences": [{"raw": f"words {n}"}]} for n in range(2)]
    opened, file = folder(path)
    (path / "dataset.json").write_text(json.dumps({"images": entries}))
    return lambda: KarpathyImages(path / "dataset.json", images=path), file


@pytest.mark.parametrize("made", [folder, labelled, tars, tables, karpathy])
def test_stamp__differs_for_replaced_samples_alone(made: Callable[[Path], Made], tmp_path: Path) -> None:
    opened, file = made(tmp_path)
    source = opened()
    before = [source.stamp(index) for index in range(2)]
    assert all(before) and before == [opened().stamp(index) for index in range(2)]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert source.stamp(0) != before[0] and source.stamp(1) == before[1]
    file.unlink()
    assert "absent" in source.stamp(0)


def test_stamp__covers_annotations(tmp_path: Path) -> None:
    opened, _ = folder(tmp_path)
    stamps = {opened().stamp(0)}
    (tmp_path / "0.txt").write_text("one")
    stamps.add(opened().stamp(0))
    for caption in ("one", "two"):
        (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "0.png", "caption": caption}))
        stamps.add(opened().stamp(0))
    (tmp_path / "captions.jsonl").unlink()
    labels = tmp_path / "labels.txt"
    for words in ("cat\ndog\n", "dog\ncat\n"):
        labels.write_text(words)
        stamps.add(LabelList(opened(), labels).stamp(0))
    assert len(stamps) == 6


def test_stamp__covers_the_class_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(0)], "label": [1]}), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", [("0.png", encoded(0)), ("0.cls", b"1")])
    tables = [None, *(ClassTable("mine", labels, labels) for labels in (("cat", "dog"), ("dog", "cat")))]
    of_tables = {ParquetImages(tmp_path / "a.parquet", classes=table).stamp(0) for table in tables}
    of_tars = {ClassTars(tmp_path / "a.tar", classes=table).stamp(0) for table in tables[1:]}
    assert len(of_tables) == 3 and len(of_tars) == 2


class Elsewhere(CaptionedImages):
    """Tells nothing of what it holds without reading it."""

    name = "elsewhere"

    def __len__(self) -> int:
        return 3

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        return RawSample(encoded(index), (), None, str(index))


def test_stamp__is_empty_for_remote_sources(tmp_path: Path) -> None:
    opened, file = folder(tmp_path)
    transform = EvalTransform(Preprocessing((8, 8), None))
    data = EvalSet(opened(), transform)
    both, second = data.stamp(range(2)), data.stamp(range(1, 2))
    assert len({both, second}) == 2 and len(both) == 64
    file.write_bytes(encoded(5) + b" ")
    assert data.stamp(range(2)) != both and data.stamp(range(1, 2)) == second
    assert EvalSet(Elsewhere(), transform).stamp(range(3)) == ""


@pytest.mark.parametrize(
    ("record", "captions", "label", "fault"),
    [
        ('{"caption": "half \\ud83d of it", "label": "x"}', ("half \ufffd of it",), "x", "half a surrogate pair"),
        ('{"caption": "both \\ud83d\\ude00"}', ("both \U0001f600",), None, None),
        ('{"caption": "cat", "label": 3}', ("cat",), "3", None),
        ('{"caption": "cat", "label": 3.0}', ("cat",), "3", None),
        ('{"caption": "cat", "label": -1}', ("cat",), None, None),
        ('{"caption": NaN, "label": NaN}', (), None, None),
        ('{"caption": null, "captions": ["a", null, 7]}', ("a", "7"), None, None),
        ('{"caption": ["a", {"b": 1}]}', ("a",), None, "a.json: field 'caption' holds a dict; left out"),
        ('{"caption": "cat", "label": [1, 2]}', ("cat",), None, "field 'label' holds a list; a label is a name"),
        ('["cat"]', (), None, "a.json: a json list; write an object"),
        ('{"caption": "cat"', (), None, "a.json: not valid json"),
        ("[" * 100_000, (), None, "a.json: not valid json"),
    ],
)
def test_read_json__odd_fields_are_left_out_or_repaired(
    record: str, captions: tuple[str, ...], label: str | None, fault: str | None
) -> None:
    found = read_json(record.encode(), "a.json", None)
    assert (found.captions, found.label) == (captions, label)
    assert found.text_fault is None if fault is None else fault in str(found.text_fault)


def test_read_text__bytes_that_are_not_utf8_are_replaced() -> None:
    replaced = "not UTF-8 text, other bytes replaced by U+FFFD; save it as UTF-8"
    assert read_text(b"caf\xe9", "a.txt") == Annotation(("caf\ufffd",), None, f"a.txt: {replaced}")
    found = read_json(b'{"caption": "caf\xe9"}', "a.json", None)
    assert found == Annotation(("caf\ufffd",), None, f"a.json: {replaced}")


@pytest.mark.parametrize(
    ("fields", "captions", "label"),
    [
        ({"text": "a", "TEXT": "b"}, ("a",), None),
        ({"Caption": "a", "captions": ["b"], "text": "c"}, ("a", "b"), None),
        ({"caption": None, "TEXT": "b", "URL": "u", "similarity": 0.3}, ("b",), None),
        ({"caption": math.nan, "txt": "b"}, ("b",), None),
        ({"prompt": "a", "CLASS": 3.0}, ("a",), "3"),
        ({"label": "", "class_name": "cat"}, (), "cat"),
    ],
)
def test_annotation_of__usual_names(fields: dict[str, object], captions: tuple[str, ...], label: str | None) -> None:
    assert annotation_of(fields, "x", None) == Annotation(captions, label)
