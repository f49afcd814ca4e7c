"""Labelled sets of one's own, in the layouts in which ImageNet-1k lies on people's disks."""

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
from qlip.data.sources.labelled import ClassTars, LabelList, open_labelled
from qlip.data.sources.open import open_path
from qlip.data.sources.parquet import ParquetImages
from qlip.errors import QLIPError, validate

from .samples import encoded, tokenize, write_tar

TENCH, GOLDFISH, CRANE = "n01440764", "n01443537", "n03126707"


def labels(source: CaptionedImages) -> list[str | None]:
    return [source.read(index).label for index in range(len(source))]


def test_class_folders(tmp_path: Path) -> None:
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


def test_tars_with_class_numbers_in_json(tmp_path: Path) -> None:
    some = [(f"{n:04d}", {"jpg": encoded(n, "jpeg"), "json": json.dumps({"label": n}).encode()}) for n in (1, 0)]
    path = shard(tmp_path, *some)
    source = open_labelled(path, "imagenet")
    assert labels(source) == [GOLDFISH, TENCH] == labels(pickle.loads(pickle.dumps(source)))
    with pytest.raises(QLIPError, match="the class number 1 has no name; give a class table"):
        open_labelled(path)
    assert source.read(0).image == encoded(1, "jpeg")


def test_tars_with_class_files_or_ids_in_keys(tmp_path: Path) -> None:
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
    with pytest.raises(QLIPError, match=r"x\.cls holds b'cat'; a class number is digits"):
        open_labelled(shard(tmp_path, ("x", {"png": encoded(0), "cls": b"cat"})))
    with pytest.raises(QLIPError, match="class 1000 of imagenet's 1,000; numbers run from 0"):
        open_labelled(shard(tmp_path, ("x", {"png": encoded(0), "cls": b"1000"})), "imagenet")
    with pytest.raises(QLIPError, match="labels are only read from local tars"):
        ClassTars("s3://bucket/x.tar")


def test_a_list_of_labels_for_a_flat_folder(tmp_path: Path) -> None:
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


def table(path: Path, numbers: range, extra: dict[str, list[Any]], names: list[str] | None = None) -> None:
    """A parquet file as `datasets` writes one: images as structs, row groups of two."""
    pictures = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    content = pa.table({"image": pictures, **extra})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(content, path, row_group_size=2)


def test_parquet_with_class_labels(tmp_path: Path) -> None:
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
def test_a_shuffled_pass_reads_each_row_group_once(
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
    stream = open_stream(config, 0, (4, 4), (0.5,) * 3, (0.5,) * 3, tokenize)
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


def test_blocks_of_a_table_have_its_own_size(tmp_path: Path) -> None:
    for values, message in (
        ({"block_size": 8}, "'block_size' goes with 'order: blocks' of tars; remove it"),
        ({"order": "shuffle", "window": 2}, "'window' goes with 'order: blocks'; remove it"),
    ):
        with pytest.raises(QLIPError) as caught:
            validate(SourceConfig, {"path": "x.parquet"} | values, "recipe.yaml")
        assert message in str(caught.value)


def test_names_in_a_table_must_be_among_the_classes(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", range(3), {"label": [TENCH, CRANE, None]})
    assert labels(open_labelled(f"{tmp_path}/a.parquet", "imagenet")) == [TENCH, CRANE, None]
    table(tmp_path / "b.parquet", range(2), {"label": [TENCH, "n01440765"]})
    assert labels(open_labelled(f"{tmp_path}/b.parquet")) == [TENCH, "n01440765"]
    with pytest.raises(QLIPError, match=r"b-000001: 'n01440765' is no class of imagenet \(did you mean"):
        labels(open_labelled(f"{tmp_path}/b.parquet", "imagenet"))


def test_parquet_with_captions(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", range(2), {"captions": [["one", "two"], ["three"]], "other": ["x", "y"]})
    path = str(tmp_path / "a.parquet")
    assert [open_path(path).read(index).captions for index in range(2)] == [("one", "two"), ("three",)]
    assert open_path(path, "other").read(1).captions == ("y",)
    with pytest.raises(QLIPError, match="no column 'nothing'; it has image, captions, other"):
        open_path(path, "nothing")


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
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
