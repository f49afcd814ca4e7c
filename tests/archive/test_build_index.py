"""The index: what it finds against a literal search, what it is of, and what becomes of it when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qlip.archive.dataset.layout import Layout
from qlip.archive.search import build_index as indexing
from qlip.archive.search.build_index import BUILDING, Build, build, num_lists, up_to_date
from qlip.archive.search.embeddings import Floats, Numbers, Vectors, best, exact
from qlip.archive.search.index import FOLDER, HEAD, IndexInfo, Kind, index_folder, open_index
from qlip.archive.search.index_recall import noisy_queries, recall
from qlip.errors import QLIPError
from tests.archive.made import made

ROWS, PARTS, DIM = 1100, 3, 16
TOTAL, LISTS = ROWS * PARTS, 51
KINDS: list[Kind] = ["exact", "hnsw", "ivf"]


def literal(embeddings: Floats, query: Floats, k: int) -> tuple[list[float], list[int]]:
    """The k nearest rows of one query: one product a row, then a sort."""
    scored = [(-float(np.dot(row, query)), number) for number, row in enumerate(embeddings)]
    nearest = sorted(scored)[:k]
    return [-score for score, _ in nearest], [number for _, number in nearest]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """3,300 rows in 3 parts of two row groups each."""
    return made(tmp_path_factory.mktemp("datasets") / "random", parts=PARTS, rows=ROWS, embedding_dim=DIM)


@pytest.fixture(scope="module")
def vectors(dataset: Layout) -> Vectors:
    return Vectors(dataset)


@pytest.fixture(scope="module")
def matrix(vectors: Vectors) -> Floats:
    """All embeddings, read by pyarrow alone."""
    import pyarrow.parquet as parquet

    tables = [parquet.read_table(vectors.layout.part_path(part)) for part in range(PARTS)]
    rows = [np.array(row, np.float32) for table in tables for row in table.column("embedding").to_pylist()]
    return np.stack(rows)


@pytest.fixture(scope="module")
def indexes(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Kind, Path]]:
    """An index of each kind, ivf in blocks of 1,500 rows."""
    folders = {kind: tmp_path_factory.mktemp("indexes") / kind for kind in KINDS}
    for kind, folder in folders.items():
        build(vectors, folder, Build(kind=kind, texts=noisy_queries(vectors, 20, seed=9), block_rows=1500))
    yield folders


def test_embeddings_are_read_by_range_by_number_and_by_chance(vectors: Vectors, matrix: Floats) -> None:
    assert len(vectors) == TOTAL and vectors.dim == DIM
    for first, last in ((0, None), (0, 0), (800, 2500), (ROWS - 1, ROWS + 1), (TOTAL - 1, TOTAL)):
        pieces = list(vectors.blocks(first, last, 700))
        joined = np.concatenate([rows for _, rows in pieces]) if pieces else np.empty((0, DIM))
        np.testing.assert_array_equal(joined, matrix[first:last])
        assert [start for start, _ in pieces] == (first + np.cumsum([0, *(len(r) for _, r in pieces)])[:-1]).tolist()
    rows = np.array([TOTAL - 1, 0, ROWS - 1, ROWS, 3, 3])
    np.testing.assert_array_equal(vectors.at(rows), matrix[rows])
    some = vectors.sample(100)
    assert some.shape == (100, DIM) and len(np.unique(some, axis=0)) == 100
    assert (some[:, None] == matrix[None]).all(-1).any(1).all()
    np.testing.assert_array_equal(some, vectors.sample(100))
    assert not np.array_equal(some, vectors.sample(100, seed=1))
    assert len(np.unique(vectors.sample(10**6), axis=0)) == len(matrix)


def test_exact_search_is_the_literal_one(vectors: Vectors, matrix: Floats) -> None:
    queries = noisy_queries(vectors, 7)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-6)
    scores, rows = exact(vectors, queries, 12)
    for query, found, numbers in zip(queries, scores, rows, strict=True):
        expected, expected_rows = literal(matrix, query, 12)
        assert numbers.tolist() == expected_rows
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ties_go_to_the_smaller_row_wherever_the_border_falls() -> None:
    random = np.random.default_rng(0)
    for k in (1, 3, 10):
        scores = random.integers(0, 6, (20, 90)).astype(np.float32)
        numbers: Numbers = np.stack([random.permutation(90) for _ in range(20)])
        found, rows = best(scores, numbers, k)
        for row in range(20):
            pairs = sorted(zip(-scores[row], numbers[row], strict=True))[:k]
            assert [(-a, b) for a, b in pairs] == list(zip(found[row].tolist(), rows[row].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_finds_what_exact_search_finds(
    kind: Kind, vectors: Vectors, matrix: Floats, indexes: dict[Kind, Path]
) -> None:
    index, queries = open_index(vectors, indexes[kind]), noisy_queries(vectors, 50, seed=5)
    scores, rows = index.nearest(queries, 10)
    # scores are true inner products of the dataset's own numbers
    np.testing.assert_allclose(scores, np.einsum("qe,qke->qk", queries, matrix[rows]), atol=2e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    truth, numbers = exact(vectors, queries, 10)
    if kind == "exact":
        np.testing.assert_array_equal(rows, numbers)
    assert recall(truth, scores).mean() >= 0.93
    everything, _ = index.nearest(queries, 10, effort=10**4 if kind == "hnsw" else num_lists(len(vectors)))
    assert recall(truth, everything).mean() >= (0.999 if kind == "hnsw" else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_index_says_of_itself(kind: Kind, vectors: Vectors, indexes: dict[Kind, Path]) -> None:
    info, folder = IndexInfo.read(indexes[kind]), indexes[kind]
    assert info.kind == kind and info.count == TOTAL and info.manifest_fingerprint == vectors.manifest_fingerprint
    assert sorted(path.name for path in folder.iterdir()) == sorted([HEAD, *(file.name for file in info.files)])
    assert info.bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != HEAD)
    assert info.bytes / info.count < {"exact": 33, "hnsw": 320, "ivf": 45}[kind]  # 2 bytes a number, links, ids
    if kind == "exact":
        assert info.effort is None and info.recall == () and info.measured is None
        return
    # the least effort of those tried that reaches what was asked for, in both sorts of queries
    assert info.measured is not None and info.measured is info.recall[-1] and info.measured.least >= 0.95
    assert all(one.least < 0.95 for one in info.recall[:-1]) and info.queries == (200, 20)
    # measured as it says: against the literal search
    index, queries = open_index(vectors, folder), noisy_queries(vectors)
    truth, _ = exact(vectors, queries, 10)
    assert recall(truth, index.nearest(queries, 10)[0]).mean() == pytest.approx(info.measured.images, abs=1e-4)


def test_recall_counts_neighbours_and_takes_either_of_two_equal_rows() -> None:
    truth = np.array([[0.9, 0.8, 0.7, 0.7]], np.float32)
    assert recall(truth, np.array([[0.9, 0.8, 0.7, 0.7]], np.float32))[0] == 1
    assert recall(truth, np.array([[0.9, 0.7, 0.6, 0.5]], np.float32))[0] == 0.5
    assert recall(truth, np.array([[0.9, -np.inf, -np.inf, -np.inf]], np.float32))[0] == 0.25


def test_more_is_asked_of_an_index_than_there_is(tmp_path: Path) -> None:
    small = Vectors(made(tmp_path / "small", parts=2, rows=3))
    for kind in KINDS:
        build(small, what=Build(kind=kind))
        scores, rows = open_index(small, tmp_path / "small" / FOLDER).nearest(small.at(np.array([4])), 9)
        assert rows[0, 0] == 4 and sorted(rows[0, :6].tolist()) == [0, 1, 2, 3, 4, 5]
        assert rows[0, 6:].tolist() == [-1] * 3 and np.isneginf(scores[0, 6:]).all()


def test_numbers_are_mapped_from_disk_not_read(vectors: Vectors, indexes: dict[Kind, Path]) -> None:
    """The opened files are in the process's memory map, file-backed, and the dataset may be moved with its index."""
    moved = indexes["ivf"].parent / "moved"
    shutil.copytree(indexes["ivf"], moved)
    opened = {kind: open_index(vectors, moved if kind == "ivf" else indexes[kind]) for kind in KINDS}
    maps = Path("/proc/self/maps").read_text()
    for kind, index in opened.items():
        assert str((moved if kind == "ivf" else indexes[kind]) / index.info.files[-1].name) in maps
    queries = noisy_queries(vectors, 5)
    np.testing.assert_array_equal(
        opened["ivf"].nearest(queries, 10)[1], open_index(vectors, indexes["ivf"]).nearest(queries, 10)[1]
    )


def test_auto_is_exact_for_few_and_ivf_for_many() -> None:
    assert Build().kind_for(indexing.EXACT_UP_TO) == "exact" and Build().kind_for(indexing.EXACT_UP_TO + 1) == "ivf"
    assert Build(kind="hnsw").kind_for(3) == "hnsw"
    assert [num_lists(rows) for rows in (1, TOTAL, 10**6, 10**9)] == [1, LISTS, 4000, 65536]


# -------------------------------------------------------------------- what goes wrong


def test_a_dataset_without_embeddings_is_named(tmp_path: Path) -> None:
    layout = made(tmp_path / "plain", embedding_dim=None)
    with pytest.raises(QLIPError, match="has no embeddings; run `qlip tokenize` with --embeddings"):
        Vectors(layout)
    with pytest.raises(QLIPError, match="no token dataset"):
        Vectors(Layout(str(tmp_path / "nothing")))
    empty = Vectors(made(tmp_path / "empty", parts=1, rows=0))
    with pytest.raises(QLIPError, match="holds no row"):
        build(empty)


def test_a_stale_index_and_one_of_another_dataset_are_told_apart(tmp_path: Path) -> None:
    layout = made(tmp_path / "one", parts=3)
    vectors, folder = Vectors(layout), tmp_path / "one" / FOLDER
    with pytest.raises(QLIPError, match="no index; make one with `qlip tokens index`"):
        open_index(vectors, folder)
    build(vectors)
    assert up_to_date(vectors, folder, None) is not None and up_to_date(vectors, folder, "ivf") is None

    made(tmp_path / "one", parts=4)  # the same parts and one more
    grown = Vectors(Layout(layout.address))
    with pytest.raises(
        QLIPError,
        match=r"stale, the dataset changed .*\(15 rows then, 20 now\); rebuild it with `.*one`",
    ):
        open_index(grown, folder)
    assert up_to_date(grown, folder, None) is None
    with pytest.raises(QLIPError, match="an index of another dataset"):
        open_index(Vectors(made(tmp_path / "two", seed=1)), folder)
    with pytest.raises(QLIPError, match=r"another model's embeddings \(codes cccccccccccc, text eeeeeeeeeeee"):
        open_index(Vectors(made(tmp_path / "three", text_fingerprint="f" * 64)), folder)
    with pytest.raises(QLIPError, match="name a folder for it"):
        index_folder(Layout("memory://somewhere"))


def test_a_damaged_index_is_refused_before_faiss_reads_it(vectors: Vectors, indexes: dict[Kind, Path]) -> None:
    for kind in KINDS:
        folder = indexes[kind].parent / f"{kind}-damaged"
        shutil.copytree(indexes[kind], folder)
        path = folder / IndexInfo.read(folder).files[-1].name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damage, message in ((bytes(flipped), "another checksum"), (whole[:-100], "bytes of")):
            path.write_bytes(damage)
            with pytest.raises(QLIPError, match=rf"{path.name}: damaged .*{message}.*; rebuild it with"):
                open_index(vectors, folder)
        with pytest.raises(QLIPError, match="damaged"):
            open_index(vectors, folder, check=False)  # its size is looked at all the same
        path.unlink()
        with pytest.raises(QLIPError, match="No such file"):
            open_index(vectors, folder)


def test_a_head_that_is_none_is_refused(vectors: Vectors, indexes: dict[Kind, Path], tmp_path: Path) -> None:
    values = json.loads((indexes["exact"] / HEAD).read_text())
    head = tmp_path / HEAD
    for content, message in (
        ("{", "not JSON"),
        (json.dumps(values | {"version": 2}), "version 2 of indexes; pip install -U qlip"),
        (json.dumps(values | {"kinds": 1}), r"unknown key 'kinds' \(did you mean 'kind'"),
        (json.dumps(values | {"files": [values["files"][0] | {"name": "../../x.faiss"}]}), "files.0.name"),
    ):
        head.write_text(content)
        with pytest.raises(QLIPError, match=message):
            open_index(vectors, tmp_path)
    shutil.copy(indexes["exact"] / values["files"][0]["name"], tmp_path)
    head.write_text(json.dumps(values | {"count": TOTAL - 1}))
    with pytest.raises(QLIPError, match=r"not the index that index\.json describes"):
        open_index(vectors, tmp_path)


def test_a_stop_leaves_the_old_index_whole_and_ivf_goes_on(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / FOLDER
    old = build(vectors, folder, Build(kind="exact"))

    class Stop(Exception):
        pass

    def stop_after(limit: int) -> Build:
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if done > limit:
                raise Stop

        return Build(kind="ivf", block_rows=600, on_progress=advance)

    for limit, blocks in ((300, 0), (1500, 2), (2700, 4), (4000, 6)):  # the last while recall is measured
        with pytest.raises(Stop):
            build(vectors, folder, stop_after(limit))
        assert open_index(vectors, folder).info == old
        assert len(list((folder / BUILDING).glob("block-*.faiss"))) == blocks

    trained = []
    monkeypatch.setattr(indexing, "_trained", lambda *arguments: trained.append(arguments))
    new = build(vectors, folder, Build(kind="ivf", block_rows=600))
    assert not trained  # what the stopped runs had done was not done again
    assert sorted(path.name for path in folder.iterdir()) == sorted([HEAD, *(file.name for file in new.files)])
    monkeypatch.undo()
    whole = build(vectors, tmp_path / "undisturbed", Build(kind="ivf", block_rows=600))
    assert [file.sha256 for file in new.files][1] == [file.sha256 for file in whole.files][1]
    assert [one.images for one in new.recall] == [one.images for one in whole.recall]


def test_blocks_of_another_dataset_are_not_taken(vectors: Vectors, tmp_path: Path) -> None:
    other = Vectors(made(tmp_path / "other", parts=2, rows=800, embedding_dim=DIM, seed=3))
    folder = tmp_path / FOLDER

    def stop(rows: int) -> None:
        if (folder / BUILDING / "block-00001.faiss").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(vectors, folder, Build(kind="ivf", block_rows=600, on_progress=stop))
    build(other, folder, Build(kind="ivf", block_rows=600))
    query = other.at(np.array([17]))
    assert open_index(other, folder).nearest(query, 1, effort=LISTS)[1] == [[17]]


def test_a_kill_leaves_nothing_half(vectors: Vectors, tmp_path: Path) -> None:
    """Killed with -9 inside the last block; the same call then goes on and finishes."""
    folder = tmp_path / FOLDER
    program = f"""
import os, signal
from pathlib import Path
from qlip.archive.search.build_index import Build, build
from qlip.archive.dataset.layout import Layout
from qlip.archive.search.embeddings import Vectors
folder = Path({str(folder)!r})
def kill(rows):
    if len(list(folder.glob("building/block-*.faiss"))) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
build(Vectors(Layout({vectors.layout.address!r})), folder, Build(kind="ivf", block_rows=600, on_progress=kill))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    with pytest.raises(QLIPError, match="no index"):
        open_index(vectors, folder)
    kept = {path: path.stat().st_mtime_ns for path in (folder / BUILDING).glob("block-*.faiss")}
    assert len(kept) == 5

    def look(rows: int) -> None:
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())

    build(vectors, folder, Build(kind="ivf", block_rows=600, on_progress=look))
    queries = noisy_queries(vectors, 20)
    assert (open_index(vectors, folder).nearest(queries, 10, effort=LISTS)[1] == exact(vectors, queries, 10)[1]).all()


def test_two_builds_in_one_folder_do_not_meet(vectors: Vectors, tmp_path: Path) -> None:
    """The second is refused, and the first finishes all the same."""
    refused = []

    def meanwhile(rows: int) -> None:
        if not refused:
            with pytest.raises(QLIPError, match="another `qlip tokens index` is running here") as error:
                build(vectors, tmp_path, Build(kind="exact"))
            refused.append(error)

    build(vectors, tmp_path, Build(kind="exact", on_progress=meanwhile))
    assert refused and len(open_index(vectors, tmp_path).nearest(vectors.at(np.array([3])), 1)[1]) == 1


def test_a_folder_that_cannot_be_written_is_named(vectors: Vectors, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QLIPError, match=r"file/index: cannot write \(Not a directory\)"):
        build(vectors, tmp_path / "file" / "index", Build(kind="exact"))


def test_a_full_disk_is_named_and_the_old_index_stays(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes nothing: what faiss writes goes there."""
    import faiss

    old = build(vectors, tmp_path, Build(kind="exact"))
    write = faiss.write_index
    monkeypatch.setattr(faiss, "write_index", lambda index, path: write(index, "/dev/full"))
    for kind in KINDS:
        with pytest.raises(QLIPError, match=r"cannot write \(.*\); free the disk or choose another folder"):
            build(vectors, tmp_path, Build(kind=kind))
        assert open_index(vectors, tmp_path).info == old


def test_rows_without_a_usable_embedding_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for value, message in ((None, "1 rows have no embedding"), ([float("nan")] * 8, "not finite")):
        layout = made(tmp_path / str(value)[:4], parts=1)
        table = parquet.read_table(layout.part_path(0))
        rows = table.column("embedding").to_pylist()
        rows[2] = None if value is None else np.array(value, np.float16)
        kept = [None if row is None else np.array(row, np.float16) for row in rows]
        column = pa.array(kept, table.schema.field("embedding").type)
        broken = table.set_column(table.schema.get_field_index("embedding"), table.schema.field("embedding"), column)
        layout.write_manifest([layout.write_part(layout.read_info(), 0, "x", 5, broken)])
        with pytest.raises(QLIPError, match=message):
            build(Vectors(layout))
