"""Parquet tables: columns, labels, captions, row groups."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip.data.config import DataConfig, SourceConfig
from qlip.data.image_feed import open_stream
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.classes import ClassTable
from qlip.data.sources.labelled import open_labelled
from qlip.data.sources.open import open_path
from qlip.data.sources.parquet import ParquetImages
from qlip.errors import QLIPError, validate
from qlip.modeling import Preprocessing

from ..samples import encoded, tokenize

TENCH, GOLDFISH, CRANE = "n01440764", "n01443537", "n03126707"


def labels(source: CaptionedImages) -> list[str | None]:
    return [source.read(index).label for index in range(len(source))]


def table(path: Path, numbers: range, extra: dict[str, list[Any]], names: list[str] | None = None) -> None:
    """A parquet file as `datasets` writes one: images as structs, row groups of two."""
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    content = pa.table({"image": images, **extra})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(content, path, row_group_size=2)


def test_parquet_images__class_labels(tmp_path: Path) -> None:
    table(tmp_path / "val-0.parquet", range(5), {"label": [0, 1, 1, 0, -1]}, ["tench", "goldfish"])
    table(tmp_path / "val-1.parquet", range(5, 8), {"label": [1, 0, 1]}, ["tench", "goldfish"])
    source = open_path(f"{tmp_path}/val-*.parquet")
    assert len(source) == 8 and source.chunk_sizes() == [2, 2, 1, 2, 1]
    assert labels(source) == ["tench", "goldfish", "goldfish", "tench", None, "goldfish", "tench", "goldfish"]
    assert [source.key(index) for index in (0, 4, 5)] == ["val-0-000000", "val-0-000004", "val-1-000000"]
    again = pickle.loads(pickle.dumps(source))
    for index in (7, 0, 4, 3):
        assert again.read(index).image == encoded(index)
    assert labels(open_labelled(f"{tmp_path}/val-1.parquet", "imagenet")) == [GOLDFISH, TENCH, GOLDFISH]
    with pytest.raises(QLIPError, match=r"val-1-000000: class 1 of x's 1; numbers run from 0"):
        labels(ParquetImages(f"{tmp_path}/val-1.parquet", classes=ClassTable("x", ("a",), ("a",))))


@pytest.mark.parametrize(
    ("order", "keep", "once_each"),
    [
        ({}, 4, True),  # blocks, a row group each, are a table's own order
        ({"order": "blocks", "window": 3}, 3, True),
        ({"order": "shuffle"}, 1, False),
    ],
)
def test_parquet_images__a_shuffled_pass_reads_each_row_group_once(
    order: dict[str, Any], keep: int, once_each: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, count in enumerate((15, 16)):
        table(tmp_path / f"{file}.parquet", range(count), {"caption": [str(number) for number in range(count)]})
    config = DataConfig(sources=[SourceConfig(path=f"{tmp_path}/*.parquet", **order)])
    read: list[int] = []
    once = ParquetImages._read_group
    monkeypatch.setattr(
        ParquetImages, "_read_group", lambda self, group, rows: read.append(group) or once(self, group, rows)
    )
    stream = open_stream(config, 0, Preprocessing((4, 4), None), tokenize)
    source = stream.sources[0].images
    assert isinstance(source, ParquetImages) and source.keep == keep and len(source.chunk_sizes()) == 16
    for epoch in range(2):
        read.clear()
        keys = [raw.key for raw in stream.raw(np.arange(31 * epoch, 31 * (epoch + 1))).samples]
        assert sorted(keys) == [source.key(index) for index in range(31)] and keys != sorted(keys)
        assert len(source._kept) <= keep
        if once_each:  # what the pass before left in memory need not be read
            assert len(set(read)) == len(read) >= 16 - keep * epoch
        else:
            assert len(read) > 25
    many = pickle.loads(pickle.dumps(source))
    assert many._kept == {} and many.read(5).captions == ("5",)


def test_source_config__blocks_of_a_table_are_its_row_groups(tmp_path: Path) -> None:
    for values, message in (
        ({"block_size": 8}, "'block_size' goes with 'order: blocks' of tars; remove it"),
        ({"order": "shuffle", "window": 2}, "'window' goes with 'order: blocks'; remove it"),
    ):
        with pytest.raises(QLIPError) as caught:
            validate(SourceConfig, {"path": "x.parquet"} | values, "recipe.yaml")
        assert message in str(caught.value)


def test_parquet_images__names_must_be_classes(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", range(3), {"label": [TENCH, CRANE, None]})
    assert labels(open_labelled(f"{tmp_path}/a.parquet", "imagenet")) == [TENCH, CRANE, None]
    table(tmp_path / "b.parquet", range(2), {"label": [TENCH, "n01440765"]})
    assert labels(open_labelled(f"{tmp_path}/b.parquet")) == [TENCH, "n01440765"]
    with pytest.raises(QLIPError, match=r"b-000001: 'n01440765' is no class of imagenet \(did you mean"):
        labels(open_labelled(f"{tmp_path}/b.parquet", "imagenet"))


def test_parquet_images__captions(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", range(2), {"captions": [["one", "two"], ["three"]], "other": ["x", "y"]})
    path = str(tmp_path / "a.parquet")
    assert [open_path(path).read(index).captions for index in range(2)] == [("one", "two"), ("three",)]
    assert open_path(path, "other").read(1).captions == ("y",)
    with pytest.raises(QLIPError, match="no column 'nothing'; it has image, captions, other"):
        open_path(path, "nothing")


def test_parquet_images__odd_captions_and_labels_drop_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, range(4), {"caption": ["a", None, "b", "c"], "label": [3.0, float("nan"), -1.0, 0.5]})
    assert [open_path(str(path)).read(index).label for index in range(4)] == ["3", None, None, "0.5"]
    table(path, range(3), {"label": [1.0, 0.0, 2.0]})
    classes = ParquetImages(path, classes=ClassTable("mine", ("cat", "dog"), ("cat", "dog")))
    assert [classes.read(index).label for index in range(2)] == ["dog", "cat"]
    with pytest.raises(QLIPError, match="class 2 of mine's 2"):
        classes.read(2)
    broken = pa.array([b"caf\xe9", b"dog"]).view(pa.string())  # as some writers store Latin-1
    table(path, range(2), {"caption": broken})
    found = [ParquetImages(path).read(index) for index in range(2)]
    assert [one.captions for one in found] == [("caf\ufffd",), ("dog",)]
    assert "not UTF-8" in str(found[0].text_fault) and found[1].text_fault is None


def test_parquet_images__errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no table")
    with pytest.raises(QLIPError, match=r"a\.parquet: cannot be read \(no parquet table\)"):
        open_path(str(path))
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(QLIPError, match="no column of images .* it has x"):
        open_path(str(path))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "else.png"}]}).cast(
        pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    ), path)  # fmt: skip
    with pytest.raises(QLIPError, match="a-000000: holds no image bytes"):
        open_path(str(path)).read(0)


def test_parquet_images__equal_file_names_in_several_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        table(tmp_path / split / "0000.parquet", range(2), {})
    source = open_path(f"{tmp_path}/*/0000.parquet")
    assert [source.key(n) for n in range(4)] == [f"{s}/0000-{n:06d}" for s in ("test", "train") for n in range(2)]
    assert source.read(3).key == "train/0000-000001"
    (tmp_path / "train/0000.parquet").rename(tmp_path / "train/0001.parquet")
    assert open_path(f"{tmp_path}/*/*.parquet").key(3) == "0001-000001"


def test_parquet_images__columns_of_other_names_and_view_types(tmp_path: Path) -> None:
    images = pa.array([encoded(1), encoded(2)]).cast(pa.binary_view())
    content = {"IMAGE": images, "thumb": images, "TEXT": pa.array(["a", None], pa.string_view()), "Label": ["x", "y"]}
    pq.write_table(pa.table(content), tmp_path / "a.parquet")
    source = open_path(f"{tmp_path}/a.parquet")
    assert [(raw.image, raw.captions, raw.label) for raw in map(source.read, range(2))] == [
        (encoded(1), ("a",), "x"),
        (encoded(2), (), "y"),
    ]


def test_parquet_images__view_types_of_broken_text(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff"]).cast(pa.binary_view())
    views = pa.StringViewArray.from_buffers(pa.string_view(), 2, text.buffers())
    pq.write_table(pa.table({"image": [encoded(1), encoded(2)], "caption": views}), tmp_path / "a.parquet")
    source = open_path(f"{tmp_path}/a.parquet")
    assert source.read(0).captions == ("a",) and "not UTF-8" in str(source.read(1).text_fault)
