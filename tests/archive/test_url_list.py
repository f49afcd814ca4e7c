"""Lists of addresses from anyone: no secret is stored, no file of this machine is read, no row ends the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.archive.tokenize.inputs import InputShards, find
from qlip.archive.tokenize.url_list import Fetching
from tests.data.objects import serving
from tests.data.samples import encoded, shard

pytest.importorskip("aiohttp")
SIGNED = "?X-Amz-Signature=secret{0}&X-Amz-Expires=60"


def listed(folder: Path, *rows: str, **limits: object) -> InputShards:
    (folder / "urls.txt").write_text("\n".join(rows))
    return find(str(folder / "urls.txt"), fetching=Fetching(**{"tries": 1} | limits))  # type: ignore[arg-type]


def errors(found: InputShards) -> list[str]:
    """The reason of each row; "" where it is read."""
    (one,) = found.shards
    with one.opened() as (images, positions):
        images.prefetch(positions)
        reasons = []
        for position in positions:
            try:
                reasons.append("" if images.read(position).image else "empty")
            except QLIPError as error:
                reasons.append(str(error))
        return reasons


def test_find__signed_addresses_are_stored_without_secrets_and_resume_with_a_new_signature(tmp_path: Path) -> None:
    first, second = (
        listed(tmp_path, f"https://me:pw@host/a.png{SIGNED.format(n)}", f"https://host/b.png?id=5&sig=secret{n}&se=9")
        for n in (1, 2)
    )
    assert first.record().difference(second.record()) is None
    with second.shards[0].opened() as (images, _):
        one, two = images.key(0), images.key(1)
    assert one == "https://host/a.png" and two.startswith("https://host/b.png?") and "secret" not in two
    other = listed(tmp_path, "https://host/a.png", "https://host/b.png?id=6")
    assert first.record().difference(other.record()) is not None


def test_find__a_signed_tar_keeps_its_name(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", range(2))
    for number in (1, 2):
        (tmp_path / f"s.tar{SIGNED.format(number)}").write_bytes((tmp_path / "s.tar").read_bytes())
    with serving(tmp_path) as server:
        records = [find(f"{server.address}/s.tar{SIGNED.format(number)}").record() for number in (1, 2)]
        assert records[0] == records[1] and records[0].shards[0].name == "s.tar"
        assert "secret" not in records[0].to_json()


def test_url_list__a_malformed_address_is_one_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "a::b.png").write_bytes(encoded(2))
    with serving(tmp_path) as server:
        rows = ["http://[::1/x", "http://", "foo://x/y", "http://" + 99 * "a" + "/x.png", f"{server.address}/a.png"]
        found = errors(listed(tmp_path, *rows, f"{server.address}/a::b.png"))
    assert [bool(reason) for reason in found] == [True] * 4 + [False] * 2
    assert all(reason.startswith(row) for row, reason in zip(rows[:4], found, strict=False))


@pytest.mark.parametrize("row", ["file:///etc/hostname", "/etc/hostname", "a.png", "simplecache::file:///etc/hostname"])
@pytest.mark.parametrize("host", ["", "http://host/x::"])
def test_url_list__files_of_this_machine_need_permission(tmp_path: Path, row: str, host: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (reason,) = errors(listed(tmp_path, host + row))
    assert reason and (host or "this machine" in reason)
    if row == "a.png" and not host:
        assert errors(listed(tmp_path, row, allow_local=True)) == [""]


def test_url_list__a_long_answer_is_one_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "b.png").write_bytes(bytes(100_000))
    with serving(tmp_path) as server:
        server.fault = lambda request: "whole"
        found = errors(listed(tmp_path, f"{server.address}/a.png", f"{server.address}/b.png", max_bytes=50_000))
    assert found[0] == "" and "larger than the 50,000 bytes that are allowed" in found[1]


def test_url_list__messages_hold_no_signature(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        for fault in ("404", "403", "500", "400", "drop"):
            server.fault = lambda request, fault=fault: fault  # type: ignore[misc]
            (reason,) = errors(listed(tmp_path, f"{server.address}/a.png{SIGNED.format(1)}"))
            assert reason.startswith(f"{server.address}/a.png: ") and "secret" not in reason, fault


def test_find__laions_column_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "part.tsv").write_text("URL\tTEXT\na.png\ta cat\n")
    (one,) = find(str(tmp_path / "part.tsv"), fetching=Fetching(allow_local=True)).shards
    with one.opened() as (images, _):
        assert images.read(0).captions == ("a cat",)


def test_url_table__rows_of_parquet_files_as_laion_writes_them(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    with serving(tmp_path) as server:
        for part, numbers in enumerate((range(5), range(5, 7))):
            columns = {
                "SAMPLE_ID": list(numbers),
                "URL": [f"{server.address}/{n}.png" if n != 3 else None for n in numbers],
                "TEXT": [f"text {n}" for n in numbers],
                "NSFW": ["UNLIKELY" for _ in numbers],
            }
            pq.write_table(arrow.table(columns), tmp_path / f"part-{part}.parquet", row_group_size=2)
        found = find(str(tmp_path / "*.parquet"), shard_size=3)
        assert [(shard.name, shard.count) for shard in found.shards] == [
            ("part-0.parquet 0 to 2", 3),
            ("part-0.parquet 3 to 4", 2),
            ("part-1.parquet 0 to 1", 2),
        ]
        assert found.kind == "addresses" and found.num_images == 7
        samples = []
        for shard in found.shards:
            with shard.opened() as (images, positions):
                for position in positions:
                    try:
                        samples.append(images.read(position))
                    except QLIPError as error:
                        assert images.key(position) == "row 4" and "names no image" in str(error)
        assert [one.image for one in samples] == [encoded(number) for number in (0, 1, 2, 4, 5, 6)]
        assert [one.captions for one in samples] == [(f"text {number}",) for number in (0, 1, 2, 4, 5, 6)]
        assert samples[3].key == f"{server.address}/4.png"
    pq.write_table(arrow.table({"TEXT": ["a"]}), tmp_path / "texts.parquet")
    with pytest.raises(QLIPError, match=r"texts.parquet: no column of images .* or of URLs; it has TEXT"):
        find(str(tmp_path / "texts.parquet"))


@pytest.mark.parametrize(("suffix", "cut"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("csv", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_url_list__laion_columns_with_any_separator(tmp_path: Path, suffix: str, cut: str, mark: str) -> None:
    """In pieces of one row, each of which is read with the list's first row."""
    rows = [
        ["SAMPLE_ID", "URL", "TEXT", "similarity"],
        ["1", "a.png", '"one; two,\t3"', "0.3"],
        ["2", "b.png", "", "0.4"],
    ]
    (tmp_path / f"list.{suffix}").write_text(mark + "\r\n".join(cut.join(row) for row in rows), encoding="utf-8")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded(1))
    found = find(str(tmp_path / f"list.{suffix}"), shard_size=1, fetching=Fetching(allow_local=True))
    read = []
    for one in found.shards:
        with one.opened() as (images, positions):
            read += [images.read(position) for position in positions]
    assert [(raw.key, raw.captions, raw.label) for raw in read] == [
        ("a.png", ("one; two, 3",), None),
        ("b.png", (), None),
    ]


def test_url_table__damaged_pages_and_tables_without_rows_are_one_line(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"url": [f"https://example.com/{number}.png" for number in range(1000)]})
    pq.write_table(table, tmp_path / "urls.parquet", compression="zstd", use_dictionary=False)
    (shard,) = find(str(tmp_path / "urls.parquet")).shards
    data = bytearray((tmp_path / "urls.parquet").read_bytes())
    data[60:160] = bytes(100)
    (tmp_path / "urls.parquet").write_bytes(data)
    with pytest.raises(QLIPError, match=r"urls\.parquet: rows 1 to 1,000 cannot be read"), shard.opened():
        pass
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(QLIPError, match=r"none\.parquet: has no row"):
        find(str(tmp_path / "none.parquet"))
