"""Verify finds every flipped bit and every truncation, names the file and the remedy, and rebuilds records."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qlip.archive.dataset.layout import ERRORS, INFO, MANIFEST, SOURCE, SUMS, Layout
from qlip.archive.dataset.parquet_reader import open_bytes
from qlip.archive.manage.merge import merge
from qlip.archive.manage.verify import verify
from tests.archive.made import info, made, table_of


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(made(tmp_path_factory.mktemp("intact") / "tokens", parts=2, rows=4, broken=1).address)


@pytest.fixture
def layout(intact: Path, tmp_path: Path) -> Layout:
    return Layout(str(shutil.copytree(intact, tmp_path / "tokens")))


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    """The bytes with one bit flipped."""
    changed = bytearray(data)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def flip(path: Path, byte: int, bit: int) -> bytes:
    """Flip a bit of a file; returns the bytes before."""
    before = path.read_bytes()
    path.write_bytes(flipped(before, byte, bit))
    return before


def content(layout: Layout) -> dict[str, bytes]:
    root = Path(layout.address)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_verify__an_intact_dataset(layout: Layout) -> None:
    report = verify(layout)
    assert report.intact and not report.findings and not report.notes
    assert (report.parts, report.rows, report.images, report.skipped) == (2, 8, 10, 2)


def test_verify__finds_400_flips_and_405_truncations_of_a_part(layout: Layout) -> None:
    path, draw = Path(layout.part_path(1)), random.Random(7)
    right = path.read_bytes()
    flips = [flipped(right, draw.randrange(len(right)), draw.randrange(8)) for _ in range(400)]
    lengths = [0, 1, len(right) - 1, *draw.sample(range(2, len(right) - 1), 402)]
    for damaged in [*flips, *(right[:length] for length in lengths)]:
        path.write_bytes(damaged)
        (finding,) = verify(layout).findings
        assert finding.file == "data/part-00001.parquet" and finding.what.startswith("damaged (")
        assert finding.what.endswith(
            "; delete data/part-00001.parquet and tokenise shard '00001.tar' again, or copy the dataset again"
        )
        sizes = f"({len(damaged):,} bytes, and the manifest says {len(right):,})"
        assert ("(its SHA-256 is not the manifest's)" if len(damaged) == len(right) else sizes) in finding.what
        assert not finding.repairable


def test_verify__repair_leaves_a_damaged_part_and_its_records(layout: Layout) -> None:
    flip(Path(layout.part_path(0)), 60, 3)
    before = content(layout)
    report = verify(layout, repair=True)
    assert not report.intact and [one.file for one in report.findings] == ["data/part-00000.parquet"]
    assert content(layout) == before


def test_verify__a_missing_part(layout: Layout) -> None:
    Path(layout.part_path(0)).unlink()
    (finding,) = verify(layout).findings
    assert finding.what.startswith("missing, but listed in the manifest; ") and "'00000.tar'" in finding.what


def writer_of(path: Path) -> range:
    """Bytes of the version of pyarrow in errors.parquet, which may be another one than today's."""
    name = b"parquet-cpp-arrow version "
    start = path.read_bytes().find(name)
    return range(start + len(name), start + len(name) + 6) if start >= 0 else range(0)


@pytest.mark.parametrize("name", [INFO, MANIFEST, "manifest/part-00001.json", ERRORS])
def test_verify__finds_each_flipped_bit_of_the_records(layout: Layout, name: str) -> None:
    path, draw = Path(layout.path(name)), random.Random(1)
    size = path.stat().st_size
    for byte in [0, size - 1, *draw.sample(range(1, size - 1), 60)]:
        bit = draw.randrange(8)
        if byte in writer_of(path):
            continue
        before = flip(path, byte, bit)
        findings = verify(layout).findings
        assert findings, (byte, bit)
        assert any(name in f"{one.file} {one.what}" for one in findings), (byte, bit, findings)
        path.write_bytes(before)


def test_verify__repairs_each_flipped_bit_of_the_records_or_leaves_it(layout: Layout) -> None:
    """A name of a shard or image alone cannot be told: both copies of the entry fit the part."""
    before, draw, left = content(layout), random.Random(2), 0
    names = [MANIFEST, "manifest/part-00001.json", INFO, ERRORS]
    for name in names:
        path = Path(layout.path(name))
        for _ in range(40):
            byte, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            if byte in writer_of(path):
                continue
            flip(path, byte, bit)
            damaged = content(layout)
            report = verify(layout, repair=True)
            assert report.findings
            if report.intact:
                assert content(layout) == before and not verify(layout).findings
            else:
                left += 1
                assert content(layout) == damaged and not any(one.repaired for one in report.findings)
                path.write_bytes(before[name])
    assert left < 40


@pytest.mark.parametrize("name", ["manifest/part-00000.json", MANIFEST])
def test_verify__repairs_the_copy_of_an_entry_that_does_not_fit_the_part(layout: Layout, name: str) -> None:
    before, path = content(layout), Path(layout.path(name))
    for key in (b"sha256", b"crc32", b'"rows', b'"inputs', b'"bytes'):
        flip(path, path.read_bytes().index(key) + len(key) + 3, 0)
        report = verify(layout, repair=True)
        assert report.intact and [finding.file for finding in report.findings] == [name], key
        assert content(layout) == before


@pytest.mark.parametrize("name", ["manifest/part-00000.json", MANIFEST])
def test_verify__entries_of_a_damaged_part_are_left_if_they_differ(layout: Layout, name: str) -> None:
    path = Path(layout.path(name))
    flip(Path(layout.part_path(0)), 60, 3)
    flip(path, path.read_bytes().index(b"sha256") + 12, 0)
    before = content(layout)
    report = verify(layout, repair=True)
    assert [finding.file for finding in report.findings] == ["data/part-00000.parquet", MANIFEST]
    assert content(layout) == before


def test_verify__lines_that_are_no_parts(layout: Layout) -> None:
    path = Path(layout.path(MANIFEST))
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    for wrong in (before[:-1], lines[1] + lines[0] * 2, before + b"\n", b"garbage\n" + lines[1]):
        path.write_bytes(wrong)
        (finding,) = verify(layout, repair=True).findings
        assert finding.file == MANIFEST and finding.repaired and path.read_bytes() == before


def test_verify__an_entry_that_cannot_be_determined_is_left(layout: Layout) -> None:
    flip(Path(layout.entry_path(0)), 25, 0)  # in the shard's name: each of the two may be right
    flip(Path(layout.path(ERRORS)), 50, 0)
    before = content(layout)
    flip(Path(layout.entry_path(1)), 0, 0)
    report = verify(layout, repair=True)
    assert not report.intact and [(one.file, one.repaired) for one in report.findings] == [
        ("manifest/part-00001.json", True),
        (MANIFEST, False),
    ]
    assert content(layout) == before and any(ERRORS in note for note in report.notes)


def test_verify__a_line_of_an_unknown_part_is_not_dropped(layout: Layout) -> None:
    path = Path(layout.path(MANIFEST))
    first, second = path.read_bytes().splitlines(keepends=True)
    Path(layout.entry_path(1)).unlink()
    path.write_bytes(first + flipped(second, 0, 0))
    before = content(layout)
    report = verify(layout, repair=True)
    assert [one.file for one in report.findings] == [MANIFEST] and not report.intact
    assert content(layout) == before and any("part-00001.parquet: not in the manifest" in one for one in report.notes)


def test_verify__the_info_is_rebuilt_from_all_parts_only(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1, prefix="a"), made(tmp_path / "b", parts=1, prefix="b", grid=(1, 2))], layout)
    before = Path(layout.path(INFO)).read_bytes()
    Path(layout.part_path(1)).unlink()
    report = verify(layout, repair=True)
    assert [finding.file for finding in report.findings] == ["data/part-00001.parquet"]
    assert Path(layout.path(INFO)).read_bytes() == before
    for path in (layout.path(MANIFEST), layout.entry_path(1)):  # as after a merge that was stopped
        Path(path).unlink()
    report = verify(layout, repair=True, allow_partial=True)
    assert not report.findings and Path(layout.path(INFO)).read_bytes() == before
    assert [one.what for one in verify(layout).findings] == [
        "incomplete: its run has not ended; run the same command again"
    ]
    place = before.index(b"code_fingerprint") + 22
    flip(Path(layout.path(INFO)), place, 0)
    (finding,) = verify(layout, repair=True, allow_partial=True).findings
    assert finding.file == INFO and "code_fingerprint" in finding.what and not finding.repairable


@pytest.mark.parametrize("name", [SOURCE, SUMS])
def test_verify__finds_each_flipped_bit_of_the_source(tmp_path: Path, name: str) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1)], layout)
    assert not verify(layout).findings
    path, draw = Path(layout.path(name)), random.Random(4)
    for byte in [0, path.stat().st_size - 1, *draw.sample(range(path.stat().st_size), 20)]:
        before = flip(path, byte, draw.randrange(8))
        (finding,) = verify(layout, repair=True).findings
        assert finding.file == SOURCE and SUMS in finding.what and not finding.repairable
        path.write_bytes(before)


def test_verify__source_without_checksums_and_checksums_without_source(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1)], layout)
    source, sums = Path(layout.path(SOURCE)), Path(layout.path(SUMS))
    kept = sums.read_bytes()
    sums.unlink()  # as of a dataset that was made before there were any
    assert not verify(layout).findings and not sums.exists()
    sums.write_bytes(kept)
    source.unlink()
    assert [one.file for one in verify(layout).findings] == [SOURCE]


def test_verify__larger_damage_is_found(layout: Layout) -> None:
    path = Path(layout.part_path(0))
    right = path.read_bytes()
    tokens = right.index(pq.read_table(path).column("tokens")[1].as_py())
    path.write_bytes(right[:tokens] + bytes(20) + right[tokens + 20 :])
    (finding,) = verify(layout, repair=True).findings
    assert finding.file == "data/part-00000.parquet" and not finding.repaired


def test_verify__rebuilds_records_that_are_missing(layout: Layout) -> None:
    before = content(layout)
    Path(layout.entry_path(1)).unlink()
    Path(layout.path(ERRORS)).unlink()
    report = verify(layout, repair=True)
    assert [one.file for one in report.findings] == ["manifest/part-00001.json", ERRORS] and report.intact
    assert content(layout) == before and not verify(layout).findings
    Path(layout.path(MANIFEST)).unlink()
    report = verify(layout)
    assert [one.file for one in report.findings] == [MANIFEST] and "the run has not ended" in report.notes[0]


def test_verify__repair_without_a_manifest_keeps_the_errors_table(layout: Layout) -> None:
    before = Path(layout.path(ERRORS)).read_bytes()
    Path(layout.path(MANIFEST)).unlink()
    for part in range(2):
        Path(layout.entry_path(part)).unlink()
    report = verify(layout, repair=True)
    assert not report.intact and Path(layout.path(ERRORS)).read_bytes() == before


def test_verify__damage_of_many_bytes_in_the_errors_table_is_a_fault(layout: Layout) -> None:
    path, draw = Path(layout.path(ERRORS)), random.Random(3)
    right = path.read_bytes().replace(b"arrow version 2", b"arrow version 1")  # rows are compared, and not bytes
    for _ in range(60):
        damaged, start = bytearray(right), draw.randrange(4, len(right))
        damaged[start : start + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
        path.write_bytes(damaged)
        assert all(one.file == ERRORS and one.repairable for one in verify(layout).findings)


def test_verify__parts_without_an_entry_are_noted(layout: Layout) -> None:
    shutil.copy(layout.part_path(1), layout.part_path(7))
    report = verify(layout)
    assert not report.findings and report.notes[0].startswith("data/part-00007.parquet: not in the manifest")


def test_verify__a_part_whose_keys_and_errors_are_not_its_shards_images(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "tokens"))
    layout.write_info(info())
    rows = table_of(info(), ["a", "b"], [(2, 2)], np.random.default_rng(0))
    layout.write_manifest([layout.write_part(info(), 0, "shard", 3, rows)])
    (finding,) = verify(layout).findings
    assert finding.what == "2 keys and 0 errors, and the shard had 3 images"


def test_verify__a_part_with_other_columns(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "tokens"))
    layout.write_info(info())
    rows = table_of(info(), ["a", "b"], [(2, 2)], np.random.default_rng(0)).drop_columns(["view"])
    layout.write_manifest([layout.write_part(info(), 0, "shard", 2, rows)])
    (finding,) = verify(layout).findings
    assert "of other names or types than its info asks for" in finding.what


def test_verify__merged_datasets_of_other_settings_are_intact(tmp_path: Path) -> None:
    first = made(tmp_path / "a", prefix="a", captions=False)
    second = made(tmp_path / "b", prefix="b", grid=[(1, 2), (2, 1)], batch_size=3)
    merged, again = Layout(str(tmp_path / "m")), Layout(str(tmp_path / "n"))
    merge([first, second], merged)
    merge([made(tmp_path / "c", prefix="c"), merged], again)
    assert not verify(merged).findings and not verify(again).findings


def test_open_bytes__keeps_no_python_object_that_a_thread_of_arrow_would_free(layout: Layout) -> None:
    """Freed while Python ends, such an object aborts the process."""
    data = Path(layout.part_path(0)).read_bytes()
    before = sys.getrefcount(data)
    opened = open_bytes(data)
    assert sys.getrefcount(data) == before and opened.metadata.num_rows == 4


@pytest.mark.slow
def test_verify__ends_with_its_exit_code_in_each_of_50_runs(tmp_path: Path) -> None:
    """Three at a time, which is when threads of Arrow's pool were seen to outlive the work."""
    address = made(tmp_path / "tokens", parts=12, rows=150, broken=1).address
    command = [sys.executable, "-m", "qlip", "tokens", "verify", address]

    def run(number: int) -> tuple[int, str]:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stderr

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(run, range(50))) == {(0, "")}
