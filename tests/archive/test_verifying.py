"""Verify: a single flipped bit is found wherever it is, and its place is named right."""

from __future__ import annotations

import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlip.archive.dataset.layout import ERRORS, INFO, MANIFEST, SOURCE, SUMS, Layout
from qlip.archive.dataset.provenance import SourceRecord, SourceShard
from qlip.archive.dataset.schema import Views
from qlip.archive.manage import flips
from qlip.archive.manage.merge import merge
from qlip.archive.manage.verify import verify
from tests.archive.made import info, made, table_of


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(made(tmp_path_factory.mktemp("sound") / "tokens", parts=2, rows=4, broken=1).address)


@pytest.fixture
def layout(sound: Path, tmp_path: Path) -> Layout:
    return Layout(str(shutil.copytree(sound, tmp_path / "tokens")))


def flip(path: Path, byte: int, bit: int) -> bytes:
    """Turn a bit of a file; returns what was there."""
    before = path.read_bytes()
    path.write_bytes(flips.flipped(before, byte, bit))
    return before


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_crc_tells_which_bit_is_flipped(data: bytes, draw: st.DataObject) -> None:
    byte, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    assert list(flips.candidates(flips.flipped(data, byte, bit), zlib.crc32(data))) == [(byte, bit)]


def test_it_tells_so_in_files_of_megabytes() -> None:
    data = random.Random(0).randbytes(3_000_000)
    for byte in (0, 1_234_567, 2_999_999):
        assert list(flips.candidates(flips.flipped(data, byte, 5), zlib.crc32(data))) == [(byte, 5)]
    twice = flips.flipped(flips.flipped(data, 7, 1), 70_000, 2)
    found = list(flips.candidates(twice, zlib.crc32(data)))
    assert all(flips.flipped(twice, *one) != data for one in found)  # two bits are not one


def test_a_sound_dataset_is_sound(layout: Layout) -> None:
    report = verify(layout)
    assert report.sound and not report.findings and not report.notes
    assert (report.parts, report.rows, report.pictures, report.broken) == (2, 8, 10, 2)


def test_each_flipped_bit_of_a_part_is_found_where_it_is(layout: Layout) -> None:
    path, draw = Path(layout.part_path(1)), random.Random(7)
    right = path.read_bytes()
    file = pq.ParquetFile(path)
    group = file.metadata.row_group(0)
    spans = {}
    for place in range(group.num_columns):
        column = group.column(place)
        begin = column.dictionary_page_offset or column.data_page_offset
        spans[column.path_in_schema.split(".")[0]] = range(begin, begin + column.total_compressed_size)
    rows = pq.read_table(path).to_pylist()
    offsets = {right.index(row["tokens"]) + place: number for number, row in enumerate(rows) for place in range(14)}
    in_tokens = draw.sample(sorted(offsets), 15)
    for byte in [*in_tokens, *(draw.randrange(len(right)) for _ in range(30)), *draw.sample(range(4, 900), 15)]:
        bit = draw.randrange(8)
        path.write_bytes(flips.flipped(right, byte, bit))
        (finding,) = verify(layout).findings
        damage = finding.damage
        assert damage is not None and finding.file == "data/part-00001.parquet"
        assert (damage.byte, damage.bit) == (byte, bit) and f"byte {byte:,}, bit {bit}" in finding.what
        assert damage.column == next((name for name, span in spans.items() if byte in span), None)
        if byte in offsets:
            assert damage.rows == (offsets[byte],) * 2 and damage.key == rows[offsets[byte]]["key"]
        elif damage.column is None:
            assert "no row is touched" in finding.what


def test_a_flipped_bit_is_mended(layout: Layout) -> None:
    paths = [Path(layout.part_path(0)), Path(layout.path(MANIFEST)), Path(layout.path(ERRORS)), Path(layout.path(INFO))]
    before = [flip(path, 60, 3) for path in paths]
    report = verify(layout, mend=True)
    assert report.sound and [finding.file for finding in report.findings] == [
        MANIFEST,
        "data/part-00000.parquet",
        INFO,
        ERRORS,
    ]
    assert [path.read_bytes() for path in paths] == before and not verify(layout).findings


def content(layout: Layout) -> dict[str, bytes]:
    root = Path(layout.address)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["manifest/part-00000.json", MANIFEST])
def test_a_flipped_bit_of_a_part_and_of_its_entry_are_mended(layout: Layout, name: str) -> None:
    before, path = content(layout), Path(layout.path(name))
    flip(Path(layout.part_path(0)), 60, 3)
    flip(path, path.read_bytes().index(b"sha256") + 12, 0)
    report = verify(layout, mend=True)
    assert report.sound and [finding.file for finding in report.findings] == [name, "data/part-00000.parquet"]
    assert content(layout) == before


@pytest.mark.parametrize("name", ["manifest/part-00000.json", MANIFEST])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_shards_name_is_what_the_errors_or_the_source_say(tmp_path: Path, name: str, broken: int) -> None:
    layout = made(tmp_path / "tokens", parts=2, rows=1, broken=broken)
    if not broken:
        shards = tuple(SourceShard(name=f"{part:05d}.tar", pictures=1, digest="") for part in range(2))
        record = SourceRecord(kind="tars", input="*.tar", options={}, shards=shards)
        layout.storage.write(layout.path(SOURCE), record.to_json().encode())
    before = content(layout)
    flip(Path(layout.path(name)), 25, 0)
    (finding,) = verify(layout, mend=True).findings
    assert finding.file == name and "one bit is flipped: byte 25, bit 0" in finding.what and finding.mended
    assert content(layout) == before


def test_lines_that_are_no_parts_are_found(layout: Layout) -> None:
    path = Path(layout.path(MANIFEST))
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    for wrong in (before[:-1], lines[1] + lines[0] * 2, before + b"\n"):
        path.write_bytes(wrong)
        (finding,) = verify(layout, mend=True).findings
        assert finding.file == MANIFEST and finding.mended and path.read_bytes() == before


def test_entries_that_cannot_be_told_apart_are_left_as_they_are(layout: Layout) -> None:
    flip(Path(layout.entry_path(0)), 25, 0)  # in the shard's name: each of the two may be right
    flip(Path(layout.path(ERRORS)), 50, 0)
    before = content(layout)
    flip(Path(layout.entry_path(1)), 0, 0)
    report = verify(layout, mend=True)
    assert not report.sound and [(one.file, one.mended) for one in report.findings] == [
        ("manifest/part-00000.json", False),
        ("manifest/part-00001.json", True),
    ]
    assert content(layout) == before
    lines = before[MANIFEST].splitlines(keepends=True)
    Path(layout.path(MANIFEST)).write_bytes(b"garbage\n" + lines[1] + b"more\n")
    assert [one.file for one in verify(layout, mend=True).findings] == [MANIFEST, "manifest/part-00002.json"]
    kept = Path(layout.path(MANIFEST)).read_bytes()
    assert kept == before["manifest/part-00000.json"] + lines[1] + b"more\n"


def test_the_info_is_not_made_again_of_some_parts(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1, prefix="a"), made(tmp_path / "b", parts=1, prefix="b", grid=(1, 2))], layout)
    before = Path(layout.path(INFO)).read_bytes()
    Path(layout.part_path(1)).unlink()
    report = verify(layout, mend=True)
    assert [finding.file for finding in report.findings] == ["data/part-00001.parquet"]
    assert Path(layout.path(INFO)).read_bytes() == before
    for path in (layout.path(MANIFEST), layout.entry_path(1)):  # as of a merge that was stopped
        Path(path).unlink()
    assert not verify(layout, mend=True).findings and Path(layout.path(INFO)).read_bytes() == before
    place = before.index(b"code_fingerprint") + 22
    flip(Path(layout.path(INFO)), place, 0)
    (finding,) = verify(layout, mend=True).findings
    assert finding.file == INFO and "code_fingerprint" in finding.what and not finding.mendable


@pytest.mark.parametrize("name", [SOURCE, SUMS])
def test_a_flipped_bit_of_the_source_is_found_named_and_mended(tmp_path: Path, name: str) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1)], layout)
    assert not verify(layout).findings
    path, before, draw = Path(layout.path(name)), content(layout), random.Random(4)
    for byte in [0, path.stat().st_size - 1, *draw.sample(range(path.stat().st_size), 20)]:
        bit = draw.randrange(8)
        flip(path, byte, bit)
        (finding,) = verify(layout).findings
        assert finding.file == name and finding.what == f"one bit is flipped: byte {byte:,}, bit {bit}"
        assert verify(layout, mend=True).sound and content(layout) == before


def test_larger_damage_of_the_source_is_left_and_said(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a", parts=1)], layout)
    source, sums = Path(layout.path(SOURCE)), Path(layout.path(SUMS))
    right = source.read_bytes()
    for damaged in (right[:-1], bytes(3) + right[3:]):
        source.write_bytes(damaged)
        (finding,) = verify(layout, mend=True).findings
        assert finding.file == SOURCE and not finding.mendable and source.read_bytes() == damaged
    sums.write_bytes(b"garbage")
    assert [one.file for one in verify(layout, mend=True).findings] == [SUMS]
    sums.unlink()  # as of a dataset that was made before there were any
    source.write_bytes(right)
    assert not verify(layout).findings and not sums.exists()
    sums.write_bytes(layout.storage.read(layout.path(INFO)))
    source.unlink()
    assert [one.file for one in verify(layout).findings] == [SOURCE]


@pytest.mark.parametrize("name", [INFO, MANIFEST, "manifest/part-00001.json", ERRORS])
def test_each_flipped_bit_of_the_records_is_found(layout: Layout, name: str) -> None:
    path, draw = Path(layout.path(name)), random.Random(1)
    size = path.stat().st_size
    for byte in [0, size - 1, *draw.sample(range(1, size - 1), 12)]:
        bit = draw.randrange(8)
        before = flip(path, byte, bit)
        findings = verify(layout).findings
        assert findings, (byte, bit)
        assert any(name in f"{one.file} {one.what}" and f"{byte:,}" in one.what for one in findings), (
            byte,
            bit,
            findings,
        )
        path.write_bytes(before)


def test_larger_damage_names_columns_and_rows(layout: Layout) -> None:
    path = Path(layout.part_path(0))
    right = path.read_bytes()
    tokens = right.index(pq.read_table(path).column("tokens")[1].as_py())
    path.write_bytes(right[:tokens] + bytes(20) + right[tokens + 20 :])
    (finding,) = verify(layout, mend=True).findings
    assert finding.what == "more than one bit is damaged, in columns tokens, rows 0 to 3" and not finding.mended
    path.write_bytes(right[:-30])
    what = verify(Layout(layout.address)).findings[0].what
    assert what == f"30 bytes are missing: {len(right) - 30:,} of {len(right):,}"
    path.unlink()
    assert "not there, and the manifest has it" in verify(Layout(layout.address)).findings[0].what


def test_records_that_are_gone_are_found_and_made_again(layout: Layout) -> None:
    before = Path(layout.entry_path(1)).read_bytes()
    Path(layout.entry_path(1)).unlink()
    Path(layout.path(ERRORS)).unlink()
    report = verify(layout, mend=True)
    assert [one.file for one in report.findings] == ["manifest/part-00001.json", ERRORS] and report.sound
    assert Path(layout.entry_path(1)).read_bytes() == before and not verify(layout).findings
    Path(layout.path(MANIFEST)).unlink()
    report = verify(layout)
    assert not report.findings and "its run has not ended" in report.notes[0]


def test_parts_that_no_entry_knows_are_noted(layout: Layout) -> None:
    shutil.copy(layout.part_path(1), layout.part_path(7))
    report = verify(layout)
    assert not report.findings and report.notes[0].startswith("data/part-00007.parquet: not in the manifest")


def test_rows_that_a_writer_got_wrong(tmp_path: Path) -> None:
    what, random_numbers = info(views=Views(crops="flip")), np.random.default_rng(0)
    whole = table_of(what, ["a", "a", "b", "b"], [(2, 2)], random_numbers)
    wrong = {
        "row 3 has the key and view of row 2": whole.take(pa.array([0, 1, 2, 2])),
        "2 keys and 0 errors, and the shard had 3 pictures": whole,
        "view 7, and a picture has 2": whole.set_column(1, whole.field(1), pa.array([0, 7, 0, 1], pa.uint8())),
    }
    for number, (message, table) in enumerate(wrong.items()):
        layout = Layout(str(tmp_path / str(number)))
        layout.write_info(what)
        layout.write_manifest([layout.write_part(what, 0, "shard", 3 if "3 pictures" in message else 2, table)])
        assert any(message in one.what for one in verify(layout).findings), message


def test_tokens_that_do_not_fit_their_grid(tmp_path: Path) -> None:
    what = info(grid=None, bits_per_token=21, group_size=7)
    table = table_of(what, ["a", "b"], [(2, 2), (1, 3)], np.random.default_rng(0))
    first = table.column("tokens")[0].as_py()
    for number, (tokens, row) in enumerate([([first, b"short"], 1), ([first[:-1] + b"\xff", None], 0)]):
        changed = [one or table.column("tokens")[1].as_py() for one in tokens]
        layout = Layout(str(tmp_path / str(number)))
        layout.write_info(what)
        broken = table.set_column(2, table.field(2), pa.array(changed, pa.binary()))
        layout.write_manifest([layout.write_part(what, 0, "shard", 2, broken)])
        (finding,) = verify(layout).findings
        assert finding.what == f"row {row} (key {'ab'[row]!r}): its tokens are not the packed bits of its grid"


def test_rows_that_stand_twice_and_pictures_of_one_name(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a", parts=1), made(tmp_path / "b", parts=1, seed=5)
    twice, named = Layout(str(tmp_path / "twice")), Layout(str(tmp_path / "named"))
    merge([first, Layout(str(shutil.copytree(first.address, tmp_path / "copy")))], twice)
    merge([first, second], named)
    (finding,) = verify(twice).findings
    assert "stands twice, in data/part-00000.parquet and data/part-00001.parquet" in finding.what
    report = verify(named)
    assert not report.findings and "5 keys name pictures in more than one part, such as" in report.notes[0]


def test_keys_are_counted_and_not_their_views(tmp_path: Path) -> None:
    first, second = (made(tmp_path / name, 1, 4, views=Views(crops="flip"), seed=name == "b") for name in "ab")
    merged = Layout(str(tmp_path / "merged"))
    assert merge([first, second], merged).repeated == 2
    report = verify(merged)
    assert not report.findings and "2 keys name pictures in more than one part, such as" in report.notes[0]


def test_merged_datasets_of_other_settings_are_sound(tmp_path: Path) -> None:
    first = made(tmp_path / "a", prefix="a", captions=False)
    second = made(tmp_path / "b", prefix="b", grid=[(1, 2), (2, 1)], batch_size=3)
    merged, again = Layout(str(tmp_path / "m")), Layout(str(tmp_path / "n"))
    merge([first, second], merged)
    merge([made(tmp_path / "c", prefix="c"), merged], again)
    assert not verify(merged).findings and not verify(again).findings
