"""Merge, split and sample: no row lost or repeated, parts copied byte by byte, resumption after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.manage import merge as merging
from qlip.archive.manage.verify import verify
from tests.archive.made import made

ROOT = Path(__file__).parents[2]


def files(layout: Layout) -> dict[str, bytes]:
    root = Path(layout.address)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def content(layout: Layout) -> list[tuple[object, ...]]:
    dataset = TokenDataset(layout.address)
    return [(row.key, row.view, row.tokens, row.captions, row.label) for row in dataset.rows(range(len(dataset)))]


class Stop(Exception):
    pass


def stop_after(count: int) -> merging.Tick:
    left = [count]

    def tick(parts: int) -> None:
        left[0] -= parts
        if not left[0]:
            raise Stop

    return tick


def test_merge__has_all_rows_and_the_bytes_of_the_parts(tmp_path: Path) -> None:
    first = made(tmp_path / "a", parts=2, prefix="a", broken=1)
    second = made(tmp_path / "b", parts=3, prefix="b", seed=1, batch_size=4)
    merged = Layout(str(tmp_path / "merged"))
    built = merging.merge([first, second], merged)
    assert (built.rows, built.parts, built.repeated) == (25, 5, 0)
    assert built.notes == (f"batch_size: {first.address} has 8, {second.address} 4",)
    assert content(merged) == content(first) + content(second)
    assert files(merged)["data/part-00002.parquet"] == files(second)["data/part-00000.parquet"]
    entries = merged.manifest()
    assert [entry.part for entry in entries] == list(range(5)) and sum(entry.inputs for entry in entries) == 27
    assert pq.read_table(merged.path("errors.parquet")).column("key").to_pylist() == ["a000-broken-0", "a001-broken-0"]
    assert merged.read_info() == first.read_info()


def test_merge__resumes_after_a_stop(tmp_path: Path) -> None:
    sources = [made(tmp_path / name, prefix=name) for name in ("a", "b")]
    whole = Layout(str(tmp_path / "whole"))
    merging.merge(sources, whole)
    for count in (1, 4, 6):
        part = Layout(str(tmp_path / f"stopped {count}"))
        with pytest.raises(Stop):
            merging.merge(sources, part, on_progress=stop_after(count))
        Path(part.entry_path(count - 1)).unlink()  # as if killed between a part and its entry
        Path(part.path("data/.part-00003.parquet.12345678.part")).write_bytes(b"half of a part")
        merging.merge(sources, part)
        assert files(part) == files(whole)
    with pytest.raises(QLIPError, match="holds another dataset"):
        merging.merge(sources[:1], whole)
    with pytest.raises(QLIPError, match="is one of the sources"):
        merging.merge(sources, sources[0])


def test_a_merge_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """-9 at moments drawn from a seed, parts copied and parts rewritten; the end is that of a run never killed."""
    made(tmp_path / "a", parts=12, rows=20, grid=[(2, 2), (1, 3)], prefix="a", broken=1)
    made(tmp_path / "b", parts=12, rows=20, prefix="b")
    command = [sys.executable, "-m", "tests.archive.killed_merge", str(tmp_path), "8", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["last"] == 0 and report["parts"] == 24
    assert len(report["done"]) >= 5 and len({done for done in report["done"] if 0 < done < 24}) >= 3
    whole, killed = (files(Layout(str(tmp_path / name))) for name in ("whole", "killed"))
    assert killed == whole and sum(name.startswith("data/") for name in whole) == 24


def test_merge__reports_repeated_keys(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a", parts=2), made(tmp_path / "b", parts=1, seed=3)
    with pytest.raises(QLIPError, match="5 keys occur in more than one dataset, such as '000-0"):
        merging.merge([first, second], Layout(str(tmp_path / "none")), unique=True)
    assert not (tmp_path / "none").exists()
    merged = Layout(str(tmp_path / "merged"))
    built = merging.merge([first, second], merged)
    assert built.repeated == 5 and set(built.examples) == {f"000-{row:04d}" for row in range(5)}
    assert [entry.shard for entry in merged.manifest()] == ["0/00000.tar", "00001.tar", "1/00000.tar"]


def test_merge__notes_different_preparations_and_claims_none_for_all(tmp_path: Path) -> None:
    names = {"a": "a" * 16, "b": "b" * 16, "old": None}
    one, other, old = (made(tmp_path / name, parts=1, prefix=name, preparation=found) for name, found in names.items())
    merged = {name: Layout(str(tmp_path / f"merged {name}")) for name in ("different", "equal", "unknown")}
    built = merging.merge([one, other], merged["different"])
    assert built.notes == (f"preparation: {one.address} has {'a' * 16}, {other.address} {'b' * 16}",)
    assert merged["different"].read_info().preparation is None
    again = made(tmp_path / "again", parts=1, prefix="again", preparation="a" * 16)
    assert merging.merge([one, again], merged["equal"]).notes == ()
    assert merged["equal"].read_info().preparation == "a" * 16
    assert merging.merge([one, old], merged["unknown"]).notes == ()
    assert merged["unknown"].read_info().preparation is None
    assert all(verify(layout).intact for layout in merged.values())
    shares = {str(tmp_path / "left"): 1.0, str(tmp_path / "right"): 1.0}
    merging.split(merged["different"], shares, by="parts")  # each part still has its own
    assert {Layout(address).read_info().preparation for address in shares} == {"a" * 16, "b" * 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"code_fingerprint": "f" * 64},
        {"bits": 14},
        {"embedding_dim": None},
        {"embedding_dim": 4},
        {"text_fingerprint": "f" * 64},
    ],
)
def test_merge__refuses_different_datasets_and_names_both(tmp_path: Path, changes: dict[str, object]) -> None:
    first, second = made(tmp_path / "one"), made(tmp_path / "two", **changes)  # type: ignore[arg-type]
    with pytest.raises(QLIPError) as caught:
        merging.merge([first, second], Layout(str(tmp_path / "merged")))
    assert first.address in str(caught.value) and second.address in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_merge__several_grids_and_captions_in_one_source(tmp_path: Path) -> None:
    plain = made(tmp_path / "a", parts=1, captions=False, prefix="a")
    many = made(tmp_path / "b", parts=1, grid=[(1, 2), (3, 1)], prefix="b")
    merged = Layout(str(tmp_path / "merged"))
    merging.merge([plain, many], merged)
    info = merged.read_info()
    assert info.grid is None and info.captions and info.token_bytes is None
    rows = [(key, view, tokens) for key, view, tokens, *_ in content(merged)]
    assert rows == [(key, view, tokens) for one in (plain, many) for key, view, tokens, *_ in content(one)]
    again = Layout(str(tmp_path / "again"))
    merging.merge([merged, many], again)
    assert again.read_info() == info


def test_merge__refuses_a_damaged_source(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", prefix="b")
    path = Path(second.part_path(1))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # a statistic: pyarrow alone would not notice
    path.write_bytes(data)
    with pytest.raises(QLIPError, match=r"part-00001.parquet: damaged"):
        merging.merge([first, second], Layout(str(tmp_path / "merged")))


def test_merge_split_and_sample__do_not_overwrite_other_files(tmp_path: Path) -> None:
    source, foreign = made(tmp_path / "all", parts=2), tmp_path / "foreign"
    path = foreign / "data/part-00000.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    output, other = Layout(str(foreign)), str(tmp_path / "other")
    for build in (
        lambda: merging.merge([source], output),
        lambda: merging.split(source, {other: 1.0, output.address: 1.0}),
        lambda: merging.sample(TokenDataset(source.address), output, 2),
    ):
        with pytest.raises(QLIPError, match="holds 'data' and no token dataset; give a new or an empty folder"):
            build()
    assert path.read_bytes() == b"mine" and [one.name for one in foreign.iterdir()] == ["data"]


@pytest.mark.parametrize("by", ["rows", "parts"])
def test_split__is_disjoint_complete_seeded_and_resumes(tmp_path: Path, by: str) -> None:
    source = made(tmp_path / "all", parts=4, rows=30, broken=3, views=Views(crops="flip"))
    outputs = {str(tmp_path / "train"): 3.0, str(tmp_path / "test"): 1.0}
    with pytest.raises(Stop):
        merging.split(source, outputs, by=by, seed=1, on_progress=stop_after(2))  # type: ignore[arg-type]
    built = merging.split(source, outputs, by=by, seed=1)  # type: ignore[arg-type]
    parts = [content(Layout(address)) for address in outputs]
    assert sorted(parts[0] + parts[1], key=str) == sorted(content(source), key=str)
    assert not {row[0] for row in parts[0]} & {row[0] for row in parts[1]}  # both views on one side
    assert 0.6 < built[str(tmp_path / "train")].rows / 120 < 0.9
    for address in outputs:
        entries = Layout(address).manifest()
        assert all(entry.inputs == entry.rows // 2 + len(entry.errors) for entry in entries)
    broken = [pq.read_table(f"{address}/errors.parquet").num_rows for address in outputs]
    assert sum(broken) == 12
    other = {str(tmp_path / "train2"): 3.0, str(tmp_path / "test2"): 1.0}
    merging.split(source, other, by=by, seed=3)  # type: ignore[arg-type]
    assert content(Layout(str(tmp_path / "test2"))) != parts[1]
    with pytest.raises(QLIPError, match="holds another dataset"):
        merging.split(source, outputs, by=by, seed=2)  # type: ignore[arg-type]


def test_split__by_parts_describes_its_own_parts(tmp_path: Path) -> None:
    merged, outputs = Layout(str(tmp_path / "merged")), {str(tmp_path / "x"): 1.0, str(tmp_path / "y"): 1.0}
    merging.merge(
        [made(tmp_path / name, parts=1, prefix=name, batch_size=size) for name, size in (("a", 8), ("b", 4))], merged
    )
    for seed in range(3):
        here = {f"{address}{seed}": share for address, share in outputs.items()}
        merging.split(merged, here, by="parts", seed=seed)
        for address in here:
            assert not verify(Layout(address)).findings


def test_split__refuses_impossible_shares(tmp_path: Path) -> None:
    source = made(tmp_path / "all", parts=2)
    with pytest.raises(QLIPError, match="two outputs at least"):
        merging.split(source, {str(tmp_path / "one"): 1.0})
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(QLIPError, match="each with a finite share above 0"):
            merging.split(source, {str(tmp_path / "one"): 1.0, str(tmp_path / "two"): bad})
    with pytest.raises(QLIPError, match="2 parts for 3 datasets; split by rows"):
        merging.split(source, {str(tmp_path / str(i)): 1.0 for i in range(3)}, by="parts")


def test_sample__is_random_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SAMPLE_ROWS", 4)
    source = TokenDataset(made(tmp_path / "all", parts=3, rows=10).address)
    output = Layout(str(tmp_path / "few"))
    built = merging.sample(source, output, 9, seed=5)
    rows = merging.sample_rows(30, 9, 5)
    assert (built.rows, built.parts) == (9, 3) and len(set(rows.tolist())) == 9
    few = TokenDataset(output.address)
    assert torch.equal(few[:], source.batch(rows)) and few.rows(range(9)) == source.rows(rows)
    assert np.array_equal(few.embeddings(), source.embeddings(rows)) and few.info == source.info
    assert not np.array_equal(rows, merging.sample_rows(30, 9, 6))
    assert merging.sample_rows(3, 9).tolist() == [0, 1, 2]
    before = Path(output.part_path(1)).stat().st_mtime_ns
    Path(output.entry_path(2)).unlink()  # as if killed before the last part was done
    assert merging.sample(source, output, 9, seed=5) == built and few.rows(range(9)) == source.rows(rows)
    assert Path(output.part_path(1)).stat().st_mtime_ns == before


def test_merge__drop_duplicates_keeps_the_first_of_each_key(tmp_path: Path) -> None:
    first = made(tmp_path / "a", parts=1, rows=5)
    second = made(tmp_path / "b", parts=2, rows=8, seed=1, broken=1)
    merged, stopped = Layout(str(tmp_path / "m")), Layout(str(tmp_path / "stopped"))
    built = merging.merge([first, second, second], merged, drop_duplicates=True)
    assert built.rows == 5 + 3 + 8 and not verify(merged).findings
    rows = content(first) + content(second)[5:]
    assert content(merged) == rows
    assert sum(len(entry.errors) for entry in merged.manifest()) == 2
    with pytest.raises(Stop):
        merging.merge([first, second, second], stopped, drop_duplicates=True, on_progress=stop_after(3))
    merging.merge([first, second, second], stopped, drop_duplicates=True)
    assert files(stopped) == files(merged)
    with pytest.raises(QLIPError, match="holds another dataset"):
        merging.merge([first, second, second], merged)
