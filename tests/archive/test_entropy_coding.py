"""Entropy-coded datasets read, verified and merged as raw ones are."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.entropy_coding import RowCoder, write_tables
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import arrow_schema
from qlip.archive.dataset.stream import TokenStream
from qlip.archive.manage.merge import merge, sample, split
from qlip.archive.manage.verify import verify
from qlip.tokens.entropy.tables import FILE, Tables
from qlip.tokens.entropy.train_tables import ContextNetwork
from tests.archive.made import info, made, table_of

GRIDS = [(4, 4), (2, 5)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that was not trained, but expects zeros."""
    torch.manual_seed(0)
    network = ContextNetwork(28, 4)
    with torch.no_grad():
        network.bias.fill_(-3.0)
    path = tmp_path_factory.mktemp("tables") / FILE
    Tables.from_network(network).save(path)
    return path


def coded(folder: Path, tables: Path, seed: int = 0, prefix: str = "") -> tuple[Layout, list[bytes]]:
    """A dataset of two parts, every other row of zeros, which shrink; and its packed bits."""
    coder, layout, packed = RowCoder(Tables.load(tables)), Layout(str(folder)), []
    what = info(grid=None, coding="entropy", table_hash=coder.table_hash)
    write_tables(layout, tables.read_bytes())
    layout.write_info(what)
    entries = []
    for part in range(2):
        raw = info(grid=None)
        names = [f"{prefix}{part}-{row}" for row in range(6)]
        table = table_of(raw, names, GRIDS, np.random.default_rng(seed + part))
        rows = [bytes(len(row)) if place % 3 else row for place, row in enumerate(table.column("tokens").to_pylist())]
        grids = [(height, width) for height, width in table.column("grid").to_pylist()]
        stored = coder.encode(rows, grids)
        assert [len(one) < len(row) for one, row in zip(stored, rows, strict=True)] == [bool(i % 3) for i in range(6)]
        columns = [pa.array(stored) if name == "tokens" else table.column(name) for name in table.schema.names]
        entry = layout.write_part(
            what, part, f"{prefix}{part}", 6, pa.Table.from_arrays(columns, schema=arrow_schema(what))
        )
        entries.append(entry)
        packed += rows
    layout.write_manifest(entries)
    return layout, packed


def test_token_dataset__decodes_coded_rows_exactly(tmp_path: Path, tables: Path) -> None:
    layout, packed = coded(tmp_path / "t", tables)
    dataset = TokenDataset(layout.address)
    assert dataset.packed(range(12)) == packed and [row.tokens for row in dataset.rows(range(12))] == packed
    assert dataset.indices([0, 1])[1].shape == (10, 2)
    again = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(one, other) for one, other in zip(again.indices(range(12)), dataset, strict=True))
    batch = next(iter(TokenStream(dataset, 12, shuffle="none")))
    assert torch.equal(batch.indices[11], dataset[11])


def test_merge_split_and_sample__copy_the_entropy_tables(tmp_path: Path, tables: Path) -> None:
    first, packed = coded(tmp_path / "a", tables, prefix="a")
    second, others = coded(tmp_path / "b", tables, seed=9, prefix="b")
    merged, few = Layout(str(tmp_path / "m")), Layout(str(tmp_path / "few"))
    merge([first, second], merged)
    assert TokenDataset(merged.address).packed(range(24)) == packed + others
    sample(TokenDataset(merged.address), few, 5)
    halves = split(merged, {str(tmp_path / "x"): 1, str(tmp_path / "y"): 1})
    assert sum(one.rows for one in halves.values()) == 24
    for layout in (first, merged, few, *(Layout(address) for address in halves)):
        assert not verify(layout).findings
    raw = made(tmp_path / "raw", embedding_dim=None)
    with pytest.raises(QLIPError, match="coding raw, and .* has entropy"):
        merge([first, raw], Layout(str(tmp_path / "none")))


def test_token_dataset__missing_or_other_entropy_tables_are_an_error(tmp_path: Path, tables: Path) -> None:
    layout, _ = coded(tmp_path / "t", tables)
    path = Path(layout.path(FILE))
    Tables.from_network(ContextNetwork(28, 4)).save(path)
    with pytest.raises(QLIPError, match="and the tokens were coded with"):
        TokenDataset(layout.address)
    (finding,) = verify(Layout(layout.address)).findings
    assert finding.file == FILE and "the tokens were coded with" in finding.what
    path.write_bytes(tables.read_bytes()[:-1])
    with pytest.raises(QLIPError, match=f"{path}: not a whole safetensors file"):
        TokenDataset(layout.address)
    remote = fsspec.filesystem("memory")
    remote.put(layout.address, "/coded", recursive=True)
    with pytest.raises(QLIPError, match=f"memory://coded/{FILE}: not a whole safetensors file"):
        TokenDataset("memory://coded")
    path.unlink()
    with pytest.raises(QLIPError, match="not there, and the tokens were coded with it"):
        TokenDataset(layout.address)


def test_token_dataset__refuses_a_row_that_no_coder_writes(tmp_path: Path, tables: Path) -> None:
    layout, _ = coded(tmp_path / "t", tables)
    what, table = layout.read_info(), pq.read_table(layout.part_path(0))
    rows = table.column("tokens").to_pylist()
    rows[1] += bytes(3)  # a coder ends before zeros
    broken = table.set_column(2, table.field(2), pa.array(rows))
    layout.write_manifest([layout.write_part(what, 0, "0", 6, broken), layout.manifest()[1]])
    with pytest.raises(QLIPError, match="bytes"):
        TokenDataset(layout.address).packed([1])
