"""Own keys and further columns of a dataset, from tables, lists and the JSON files of tars and folders."""

from __future__ import annotations

import io
import json
import tarfile
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip import QLIPError
from qlip.archive import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.manage.export_webdataset import export
from qlip.archive.manage.merge import merge
from qlip.archive.manage.verify import verify
from qlip.archive.tokenize.encoder import Encoder, describe
from qlip.archive.tokenize.inputs import find
from qlip.archive.tokenize.preprocess import ShardEnd, batches_of, text_of_field
from qlip.archive.tokenize.runner import Run, encode_here
from qlip.archive.tokenize.url_list import Fetching
from tests.cli.conftest import save_checkpoint
from tests.data.samples import encoded

FIELDS: list[dict[str, Any]] = [
    {"id": "a-0", "width": 640, "tags": ["x", "y"], "caption": "zero"},
    {"id": "a-1", "width": None, "tags": [], "caption": "one"},
    {"id": "a-2", "width": 12, "tags": ["z"], "caption": "two"},
]
STORED = [{"width": "640", "tags": '["x", "y"]'}, {"width": None, "tags": "[]"}, {"width": "12", "tags": '["z"]'}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "one", seed=0)


def tokenized(source: str, model: Path, output: Path, columns: tuple[str, ...] = ("width", "tags")) -> TokenDataset:
    found = find(source, fetching=Fetching(allow_local=True), key_column="id", columns=columns)
    work = describe(str(model), Views(), batch_size=2, columns=columns, key_column="id")
    run = Run(Layout(str(output)), found, work)
    run.begin()
    outcome = run.write_parts(encode_here(run.todo, Encoder(run.work), run.work, 1))
    assert not outcome.failed, outcome.failed
    return TokenDataset(output)


def as_folder(folder: Path) -> str:
    for number, fields in enumerate(FIELDS):
        (folder / f"{number}.png").write_bytes(encoded(number))
        (folder / f"{number}.json").write_text(json.dumps(fields))
    return str(folder)


def as_folder_with_a_table(folder: Path) -> str:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(number))
    lines = [json.dumps({"file_name": f"{number}.png"} | fields) for number, fields in enumerate(FIELDS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def as_tar(folder: Path) -> str:
    files = {}
    for number, fields in enumerate(FIELDS):
        files |= {f"{number}.png": encoded(number), f"{number}.json": json.dumps(fields).encode()}
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


def as_parquet(folder: Path) -> str:
    rows = [fields | {"image": encoded(number)} for number, fields in enumerate(FIELDS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return str(folder / "*.parquet")


def as_list(folder: Path) -> str:
    as_folder(folder)
    lines = [json.dumps({"url": f"{number}.png"} | fields) for number, fields in enumerate(FIELDS)]
    (folder / "urls.jsonl").write_text("\n".join(lines))
    return str(folder / "urls.jsonl")


def as_parquet_list(folder: Path) -> str:
    as_folder(folder)
    rows = [{"url": f"{number}.png"} | fields for number, fields in enumerate(FIELDS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "urls.parquet")
    return str(folder / "urls.parquet")


@pytest.mark.parametrize("source", [as_folder, as_folder_with_a_table, as_tar, as_parquet, as_list, as_parquet_list])
def test_columns__of_every_kind_of_input_are_text(tmp_path: Path, model: Path, source: Any) -> None:
    (tmp_path / "in").mkdir()
    dataset = tokenized(source(tmp_path / "in"), model, tmp_path / "tokens")
    rows = dataset.rows(range(3))
    assert [row.key for row in rows] == ["a-0", "a-1", "a-2"]
    assert [row.captions for row in rows] == [("zero",), ("one",), ("two",)]
    assert [dict(row.extra) for row in rows] == STORED
    assert verify(Layout(str(tmp_path / "tokens"))).intact


def test_columns__merge_and_export_keep_them(tmp_path: Path, model: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tokenized(as_tar(tmp_path / "one"), model, tmp_path / "first", ("width",))
    tokenized(as_tar(tmp_path / "two"), model, tmp_path / "second", ("tags",))
    layouts = [Layout(str(tmp_path / name)) for name in ("first", "second")]
    merge(layouts, Layout(str(tmp_path / "both")))
    both = TokenDataset(tmp_path / "both")
    assert dict(both.row(0).extra) == {"width": "640", "tags": None}
    assert dict(both.row(3).extra) == {"width": None, "tags": '["x", "y"]'}
    assert verify(Layout(str(tmp_path / "both"))).intact
    export(both, str(tmp_path / "tars"))
    with tarfile.open(tmp_path / "tars" / "part-00000.tar") as tar:
        record = json.load(tar.extractfile("a-0.json"))  # type: ignore[arg-type]
    assert (record["key"], record["width"], record["tags"]) == ("a-0", "640", None)


def test_columns__names_that_are_taken_or_absent_are_one_line(tmp_path: Path, model: Path) -> None:
    with pytest.raises(QLIPError, match="column 'label': a dataset has a column of this name"):
        describe(str(model), Views(), columns=("label",))
    source = as_parquet(tmp_path)
    with pytest.raises(QLIPError, match=r"t\.parquet: no column 'widht'; it has id, width"):
        find(source, columns=("widht",))
    found = find(as_tar(tmp_path), key_column="id")
    assert found.record().difference(find(as_tar(tmp_path)).record()) == "it was made with --key-column id, not None"


def as_csv_list(folder: Path) -> str:
    as_folder(folder)
    rows = [f"{number}.png,a-{number},{fields['width'] or ''}" for number, fields in enumerate(FIELDS)]
    (folder / "urls.csv").write_text("\n".join(["url,id,width", *rows]))
    return str(folder / "urls.csv")


@pytest.mark.parametrize("source", [as_folder, as_folder_with_a_table, as_list, as_csv_list, as_parquet_list])
@pytest.mark.parametrize("name", ["widht", ""])
def test_columns__a_name_that_no_image_has_is_one_line(tmp_path: Path, source: Any, name: str) -> None:
    said = "the name of a column to read is empty" if not name else "no (column|image has a field) 'widht'; .*width"
    with pytest.raises(QLIPError, match=said):
        find(source(tmp_path), columns=("width", name))
    assert find("bundled", columns=("image",)).num_images == 18


def test_columns__a_name_that_no_image_of_a_tar_has_is_counted(tmp_path: Path, model: Path) -> None:
    (shard,) = find(as_tar(tmp_path), key_column="di").shards
    *_, end = batches_of(shard, describe(str(model), Views(), batch_size=2, key_column="di"))
    assert isinstance(end, ShardEnd) and len(end.text_faults) == 3
    assert end.text_faults[0] == "0: field 'di' is empty or absent; it has 'caption', 'id', 'tags', 'width'"


def test_columns__a_cell_that_is_empty_is_called_so(tmp_path: Path, model: Path) -> None:
    found = find(as_csv_list(tmp_path), fetching=Fetching(allow_local=True), columns=("width",))
    work = describe(str(model), Views(), batch_size=2, columns=("width",))
    *_, end = batches_of(found.shards[0], work)
    assert isinstance(end, ShardEnd)
    assert end.text_faults == ("1.png: field 'width' is empty or absent; it has 'id', 'url'",)
    other = describe(str(model), Views(), batch_size=2)
    run = Run(Layout(str(tmp_path / "tokens")), found, work)
    run.begin()
    with pytest.raises(QLIPError, match="--keep-column"):
        Run(Layout(str(tmp_path / "tokens")), found, other)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (date(2024, 1, 31), "2024-01-31"),
        (datetime(2024, 1, 31, 8, 5), "2024-01-31T08:05:00"),
        (Decimal("1E+3"), "1000"),
        (Decimal("0.10"), "0.10"),
        (True, "true"),
        ([date(2024, 1, 31)], '["2024-01-31"]'),
        (float("nan"), None),
    ],
)
def test_text_of_field__dates_and_decimals_are_plain_text(value: object, text: str | None) -> None:
    assert text_of_field(value) == text
