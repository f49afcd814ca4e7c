"""TokenDataset: rows as they were written, for any group size, order and process, and for other readers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from qlip import QLIPError
from qlip.archive import LabelledTokens, TokenStream
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.parquet_reader import values_of
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema, info_of
from qlip.modeling.indices import regroup
from qlip.tokens import unpack
from tests.archive.made import made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(made(tmp_path_factory.mktemp("square") / "tokens", parts=3, rows=7, broken=1).address)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("mixed") / "tokens"
    return Path(made(where, grid=[(2, 2), (1, 3), (3, 1)], embedding_dim=None, bits=21, group_size=7).address)


def literal(folder: Path) -> list[dict[str, object]]:
    """All rows, by pyarrow alone."""
    return [row for path in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


OLD_INFO = (
    '{"batch_size": 32, "bits_per_token": 28, "captions": true, "code_fingerprint": "'
    + "c" * 64
    + '", "coding": "raw", "decoder_fingerprint": "'
    + "d" * 64
    + '", "device": "cpu", "dtype": "float32", "embedding_dim": null, "grid": [8, 8], "group_size": 7, "model": "m",'
    ' "table_hash": null, "text_fingerprint": null, "version": 1, "views": {"crop_range": 1.1, "crops": "one", "fit":'
    ' "square", "size": null}}'
)
"""The line of a `dataset.json` that version 0.1 wrote."""


def test_info__of_an_old_dataset_keeps_its_bytes() -> None:
    old = DatasetInfo.from_json(OLD_INFO, "old")
    assert old.preparation is None and old.to_json() == OLD_INFO
    assert "preparation" not in old.model_dump(mode="json")
    assert arrow_schema(old).metadata == {b"qlip": OLD_INFO.encode()}


def test_info__keeps_the_preparation(tmp_path: Path) -> None:
    layout = made(tmp_path / "new", preparation="0123456789abcdef")
    assert layout.read_info().preparation == "0123456789abcdef"
    part = pq.read_schema(tmp_path / "new/data/part-00000.parquet")
    assert info_of(part.metadata, "part") == layout.read_info()
    with pytest.raises(ValueError, match="preparation"):
        made(tmp_path / "bad", preparation="0123")


def test_token_dataset__rows_are_what_was_written(folder: Path) -> None:
    dataset, rows = TokenDataset(str(folder)), literal(folder)
    assert len(dataset) == len(rows) == 21
    for number in (0, 6, 7, 20, -1):
        row, wrote = dataset.row(number), rows[number]
        assert (row.key, row.view, row.tokens) == (wrote["key"], wrote["view"], wrote["tokens"])
        assert list(row.captions) == wrote["captions"] and row.label == wrote["label"]
        assert [list(row.grid), list(row.original_size)] == [wrote["grid"], wrote["original_size"]]
        assert row.embedding is not None and row.embedding.tolist() == wrote["embedding"]
        assert torch.equal(dataset[number], unpack(row.tokens, 4, 28, 14))
    assert torch.equal(dataset[5:9], torch.stack([dataset[i] for i in range(5, 9)]))
    shuffled = [20, 3, 3, 8, -2]
    assert torch.equal(dataset.batch(shuffled), torch.stack([dataset[i] for i in shuffled]))
    assert dataset.keys(shuffled) == [rows[i]["key"] for i in shuffled]
    assert torch.equal(torch.stack(list(dataset)), dataset[:])
    assert dataset[:0].shape == (0, 4, 2)
    with pytest.raises(IndexError, match="row 21 of 21"):
        dataset[21]


def test_token_dataset__row_numbers_of_any_integer_type_but_no_mask(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", parts=2, rows=150).address)
    keys = dataset.keys()
    for first, then in (([1], [1, 0]), ([257], [1, 1, 0, 0])):  # of the same bytes, where the second is narrower
        for dtype in (np.int64, np.int32, np.uint16, np.uint8):
            if max(first) <= np.iinfo(dtype).max:
                assert dataset.keys(np.array(first, dtype)) == [keys[row] for row in first]
            assert dataset.keys(np.array(then, dtype)) == [keys[row] for row in then]
    for bad in (np.arange(300) < 3, np.array([0.0, 1.5])):
        with pytest.raises(QLIPError, match="np.flatnonzero"):
            dataset.batch(bad)
    groups = dataset.groups
    for rows in (np.array([1, 0], np.int32), np.array([1], np.int64)):
        assert groups.take(rows, "key").to_pylist() == [keys[row] for row in rows]


def test_token_dataset__any_group_size_has_the_same_bits(folder: Path) -> None:
    whole = TokenDataset(str(folder))[:]
    for size in (1, 2, 4, 7, 28):
        assert torch.equal(TokenDataset(str(folder), group_size=size)[:], regroup(whole, size, from_group_size=14))
    with pytest.raises(QLIPError, match="group_size 5 does not divide 28 bits; take one of 1, 2, 4, 7, 14, 28"):
        TokenDataset(str(folder), group_size=5)


def test_token_dataset__embeddings(folder: Path) -> None:
    vectors = TokenDataset(str(folder)).embeddings()
    assert vectors.dtype == np.float16 and vectors.shape == (21, 8)
    assert vectors.tolist() == [row["embedding"] for row in literal(folder)]


def test_token_dataset__different_grids(mixed: Path) -> None:
    dataset, rows = TokenDataset(str(mixed)), literal(mixed)
    assert [tuple(one.shape) for one in dataset.indices([0, 1, 2, 3])] == [(4, 3), (3, 3), (3, 3), (4, 3)]
    for number, row in enumerate(rows):
        tokens = row["tokens"]
        assert isinstance(tokens, bytes)
        assert torch.equal(dataset[number], unpack(tokens, int(np.prod(row["grid"])), 21, 7))  # type: ignore[call-overload]
    assert dataset.batch([0, 3]).shape == (2, 4, 3)
    with pytest.raises(QLIPError, match="several grids"):
        dataset.batch([0, 1])
    with pytest.raises(QLIPError, match="no embeddings; tokenise again with --embeddings"):
        dataset.embeddings()


def test_token_dataset__works_in_a_data_loader(folder: Path, mixed: Path) -> None:
    dataset = TokenDataset(str(folder))
    read = torch.cat(list(DataLoader(dataset, batch_size=4, num_workers=1)))
    assert torch.equal(read, dataset[:])
    assert len(pickle.loads(pickle.dumps(TokenDataset(str(mixed))))[0]) == 4


def test_token_dataset__equal_with_a_small_cache_and_many_threads(folder: Path) -> None:
    whole = TokenDataset(str(folder))[:]
    small = TokenDataset(str(folder), cache_bytes=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: (small.row(number), small[number])[1], list(range(21)) * 5))
    assert torch.equal(torch.stack(found), whole.repeat(5, 1, 1))


def test_token_dataset__does_not_import_pandas(folder: Path) -> None:
    """pyarrow does, wherever it is installed, to ask of an array whether it is pandas': a second or two."""
    program = f"""
import sys
from qlip.archive.dataset.dataset import TokenDataset
dataset = TokenDataset({str(folder)!r})
dataset.rows([20, 0, 9]), dataset.indices([20, 0]), dataset.embeddings(), dataset.captions_and_labels([1])
assert "pyarrow" in sys.modules and "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_values_of__equals_numpy_at_any_offset() -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(range(12), pa.uint32()), 3)
    for begin, end in ((0, 4), (1, 3), (3, 4), (2, 2)):
        assert values_of(column[begin:end].flatten()).tolist() == list(range(3 * begin, 3 * end))
    assert values_of(column.flatten()[5:7]).tolist() == [5, 6]


def test_token_dataset__remote_equals_local(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/datasets/tokens", recursive=True)
    here, there = TokenDataset(str(folder)), TokenDataset("memory://datasets/tokens")
    assert torch.equal(here[:], there[:]) and here.rows([3, 9]) == there.rows([3, 9])


def test_token_dataset__missing_or_damaged_files_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="no token dataset; give a folder that `qlip tokenize` wrote"):
        TokenDataset(str(tmp_path))
    layout = made(tmp_path / "cut", parts=2)
    path = Path(layout.part_path(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(QLIPError, match=r"part-00001.parquet: damaged .*; run `qlip tokens verify`"):
        TokenDataset(layout.address)[7]
    path.unlink()
    with pytest.raises(QLIPError, match=r"part-00001.parquet: missing, but listed in the manifest"):
        TokenDataset(layout.address)[7]


def test_token_dataset__finds_a_damaged_page(tmp_path: Path) -> None:
    layout = made(tmp_path / "tokens", parts=1)
    path = Path(layout.part_path(0))
    data, wanted = bytearray(path.read_bytes()), TokenDataset(layout.address).row(2).tokens
    data[data.index(wanted) + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(QLIPError, match="damaged"):
        TokenDataset(layout.address)[2]


def test_parts__are_read_by_pyarrow_datasets_and_duckdb(folder: Path, mixed: Path, tmp_path: Path) -> None:
    import datasets

    for where in (folder, mixed):
        rows, files = literal(where), str(where / "data/*.parquet")
        whole = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        assert whole.to_list() == rows
        streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        assert list(streamed) == rows
        counted = duckdb.sql(f"SELECT count(*), sum(octet_length(tokens)) FROM '{files}'").fetchall()
        assert counted == [(len(rows), sum(len(row["tokens"]) for row in rows))]  # type: ignore[arg-type]


def test_dataset__wrong_arguments_are_one_line(folder: Path) -> None:
    dataset = TokenDataset(folder)
    for rows in (0, None, 1.5, ["a"], [0.5], np.array([[0]]), slice(0, 1)):
        for read in (dataset.batch, dataset.rows, dataset.indices, dataset.grids, dataset.packed):
            with pytest.raises(QLIPError, match="rows"):
                read(rows)  # type: ignore[operator]
    for index in ("0", None, 1.5, [0], slice(0, "a")):
        with pytest.raises(QLIPError):
            dataset[index]  # type: ignore[call-overload]
    for size in ("7", 7.0, 0, -7):
        with pytest.raises(QLIPError, match="group_size"):
            TokenDataset(folder, group_size=size)  # type: ignore[arg-type]
    calls = (
        lambda: LabelledTokens(5),  # type: ignore[arg-type]
        lambda: LabelledTokens(dataset, 5),  # type: ignore[arg-type]
        lambda: TokenStream(5, batch_size=2),  # type: ignore[arg-type]
        lambda: TokenStream(dataset, batch_size="2"),  # type: ignore[arg-type]
        lambda: TokenStream(dataset, batch_size=2.0),  # type: ignore[arg-type]
    )
    for call in calls:
        with pytest.raises(QLIPError):
            call()
