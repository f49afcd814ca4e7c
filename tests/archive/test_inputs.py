"""Inputs cut into shards: every image once, in order, opened anywhere, and another input is told apart."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip import QLIPError
from qlip.archive.dataset.provenance import SourceRecord
from qlip.archive.tokenize import inputs
from qlip.archive.tokenize.inputs import InputShard, find
from qlip.archive.tokenize.url_list import Fetching, UrlList, pieces
from qlip.data.sources.folder import FolderImages
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage
from tests.data.objects import Request, serving
from tests.data.samples import encoded, shard, write_tar

LOCAL = Fetching(allow_local=True)


def keys(one: InputShard) -> list[str]:
    """Of a shard that went to another process."""
    with pickle.loads(pickle.dumps(one)).opened() as (images, positions):
        return [images.key(position) for position in positions]


def folder(path: Path, count: int = 7) -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        (path / f"{number:02d}.png").write_bytes(encoded(number))
        (path / f"{number:02d}.txt").write_text(f"image {number}")
    return path


def table(path: Path, rows: int, group: int, column: str = "image") -> Path:
    images = pa.array([{"bytes": encoded(number), "path": None} for number in range(rows)])
    pq.write_table(pa.table({column: images, "caption": [f"row {n}" for n in range(rows)]}), path, row_group_size=group)
    return path


def test_a_folder_is_cut_in_the_order_of_its_keys(tmp_path: Path) -> None:
    found = find(str(folder(tmp_path / "photos")), shard_size=3)
    assert [one.count for one in found.shards] == [3, 3, 1] and found.num_images == 7
    assert [key for one in found.shards for key in keys(one)] == [f"{n:02d}.png" for n in range(7)]
    assert len(pickle.dumps(found.shards[0])) < 2000  # it knows its own images alone
    with found.shards[1].opened() as (images, positions):
        assert images.read(positions[0]).captions == ("image 3",)


def test_a_table_of_captions_is_cut_with_its_folder(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", 4)
    rows = [{"image": f"{n:02d}.png", "caption": f"from the table {n}"} for n in (2, 0, 3)]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find(str(photos), shard_size=2)
    assert [keys(one) for one in found.shards] == [["00.png", "02.png"], ["03.png"]]
    with found.shards[1].opened() as (images, positions):
        assert images.read(positions[0]).captions == ("from the table 3",)


def test_each_tar_is_a_shard_that_is_opened_by_its_worker(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number}.tar", range(4 * number, 4 * number + 4))
    whole = (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-1.tar").write_bytes(whole[: len(whole) // 2])
    found = find(str(tmp_path / "s-{0..2}.tar"))
    assert [one.name for one in found.shards] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert found.num_images is None  # nobody counted them
    assert keys(found.shards[2]) == [f"{n:04d}" for n in range(8, 12)]
    with pytest.raises(QLIPError, match=r"s-1\.tar: truncated.*; fetch or write it again"):
        keys(found.shards[1])
    one_by_one = find([str(tmp_path / f"s-{number}.tar") for number in range(3)])
    assert found.record().difference(one_by_one.record()) is None


def test_parquet_files_are_cut_between_row_groups(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", 10, 3)
    table(tmp_path / "b.parquet", 2, 3)
    found = find(str(tmp_path / "*.parquet"), shard_size=6)
    assert [one.name for one in found.shards] == ["a.parquet 0 to 5", "a.parquet 6 to 9", "b.parquet"]
    assert [len(keys(one)) for one in found.shards] == [6, 4, 2]
    with found.shards[1].opened() as (images, positions):
        read = [images.read(position) for position in positions]
    assert [raw.captions for raw in read] == [(f"row {n}",) for n in range(6, 10)]
    assert [raw.image for raw in read] == [encoded(n) for n in range(6, 10)]


def test_a_row_group_larger_than_memory_is_read_by_windows(tmp_path: Path) -> None:
    from qlip.data.sources.parquet import ParquetImages

    path = str(table(tmp_path / "a.parquet", 50, 50))
    images = ParquetImages(path, window=8)
    for index in (0, 7, 8, 30, 49, 12, 11, 0):  # forwards, and back
        assert images.read(index).image == encoded(index)
        assert sum(len(rows) for rows in images._kept.values()) <= 8
    assert pickle.loads(pickle.dumps(images)).read(33).captions == ("row 33",)


def test_a_column_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    two = {"left": [encoded(1)], "right": [encoded(2)]}
    pq.write_table(pa.table(two), path)
    with pytest.raises(QLIPError, match="2 columns may hold the images, left, right; name the one to read"):
        find(str(path))
    with pytest.raises(QLIPError, match="no column 'middle' of images .*; those are left, right"):
        find(str(path), image_column="middle")
    with find(str(path), image_column="right").shards[0].opened() as (images, _):
        assert images.read(0).image == encoded(2)
    with pytest.raises(QLIPError, match="has no image column"):
        find(str(folder(tmp_path / "photos", 1)), image_column="right")


def test_a_column_that_cannot_be_read_fails_its_shard(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", 40, 20)
    data = bytearray(path.read_bytes())
    data[4:304] = b"\xff" * 300
    path.write_bytes(data)
    one, two = find(str(path), shard_size=20).shards
    with one.opened() as (images, _), pytest.raises(QLIPError, match="row group 0 cannot be read .*; fetch or write"):
        [images.read(position) for position in range(20)]
    with two.opened() as (images, positions):
        assert images.read(positions[3]).image == encoded(23)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_find__lists_of_addresses(tmp_path: Path, kind: str) -> None:
    folder(tmp_path / "photos", 3)
    names = ["photos/00.png", "photos/02.png", "photos/00.png", str(tmp_path / "photos" / "01.png"), "photos/00.png"]
    path = tmp_path / f"urls.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(names) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"url": name, "caption": f"at {name}"}) for name in names))
    else:
        rows = ["url,caption,label\r\n", *(f'{name},"at\n{name}; ""so""",x\r\n' for name in names)]
        path.write_text("".join(rows).replace(",", "\t" if kind == "tsv" else ","))
    found = find(str(path), shard_size=3, fetching=LOCAL)
    assert [one.name for one in found.shards] == ["addresses 0 to 2", "addresses 3 to 4"]
    # an address that comes again in a shard is numbered there
    assert [keys(one) for one in found.shards] == [[*names[:2], "photos/00.png#2"], names[3:]]
    with found.shards[1].opened() as (images, positions):
        read = images.read(positions[0])
    assert read.image == encoded(1)
    table = (f'at {names[3]}; "so"',)
    captions = {"txt": (), "jsonl": (f"at {names[3]}",), "csv": table, "tsv": table}
    assert read.captions == captions[kind] and read.label == ("x" if kind in ("csv", "tsv") else None)
    path.write_text(path.read_text().replace("02.png", "09.png"))
    with pytest.raises(QLIPError, match="changed after it was opened"):
        keys(found.shards[0])


def read_keys(path: Path, shard_size: int) -> list[str]:
    """Of all shards of a list."""
    return [key for one in find(str(path), shard_size=shard_size).shards for key in keys(one)]


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_a_quote_inside_a_cell_is_a_letter_as_the_reader_of_rows_has_it(tmp_path: Path, begin: bytes) -> None:
    """Every row is there once, wherever pieces are cut, as one csv.DictReader over the whole file has them."""
    rows = [f"{n}.png,plain {n}" for n in range(100)]
    rows[5] = 'five.png,12" monitor'
    rows[6:9] = ['six.png,"so\n\nlong, ""x""\n"', "   ", 'Gr\u00fc\u00dfe.png,a "b" c"']
    rows[50] = ""
    path = tmp_path / "urls.csv"
    path.write_bytes(begin + "\r\n".join(["url,caption", *rows]).encode())
    text = path.read_bytes().decode("utf-8-sig")
    expected = [row for row in csv.DictReader(io.StringIO(text, newline="")) if row["url"].strip()]
    assert len(expected) == 98
    for size in (1, 3, 7, 1000):
        found = find(str(path), shard_size=size)
        assert found.num_images == 98 and sum(len(keys(one)) for one in found.shards) == 98
        assert read_keys(path, size) == [row["url"] for row in expected]
    images = UrlList(str(path), pieces(str(path), 1000, Storage())[0], None, Storage())
    captions = [images._rows[index][1].get("caption") for index in (5, 6, 7)]
    assert captions == ['12" monitor', 'so\n\nlong, "x"\n', 'a "b" c"']


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", " \nurl,caption\n\na.png,x\n  \nb.png,y\n \u00a0\n"),
        ("a.txt", "a.png\n \u00a0 \n\nb.png\n\t\n"),
        ("a.jsonl", '{"url": "a.png"}\n \u00a0\n{"url": "b.png"}\n\n'),
    ):
        (tmp_path / name).write_text(text)
        assert read_keys(tmp_path / name, 1) == read_keys(tmp_path / name, 9) == ["a.png", "b.png"], name


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_a_query_after_a_lists_name_does_not_count(tmp_path: Path, suffix: str) -> None:
    """A store's signature, say; the server here takes it for a part of the name."""
    pytest.importorskip("aiohttp")
    folder(tmp_path / "photos", 3)
    names = [f"photos/{number:02d}.png" for number in range(3)]
    lines = {"txt": names, "csv": ["url", *names], "jsonl": [json.dumps({"url": name}) for name in names]}[suffix]
    (tmp_path / f"list.{suffix}?signature=a.b").write_text("\n".join(lines))
    with serving(tmp_path) as server:
        one, two = find(f"{server.address}/list.{suffix}?signature=a.b", shard_size=2).shards
        assert keys(one) == names[:2] and keys(two) == names[2:]
        with one.opened() as (images, _):
            assert images.read(1).image == encoded(1)


@pytest.mark.parametrize("row", ['five.png,"12 inch', 'five.png,"' + "x" * 200_000])
def test_a_quote_that_nothing_closes_swallows_no_rows_unheard(tmp_path: Path, row: str) -> None:
    rows = ["url,caption", *(f"{n}.png,plain" for n in range(3)), row, *(f"{n}.png,plain" for n in range(5, 9))]
    (tmp_path / "urls.csv").write_text("\n".join(rows))
    with pytest.raises(QLIPError, match=r"urls\.csv: row 4 .*; close the quote, or write the list as \.jsonl"):
        find(str(tmp_path / "urls.csv"))


def test_url_list__row_without_an_address_is_one_broken_image(tmp_path: Path) -> None:
    folder(tmp_path / "photos", 1)
    path = tmp_path / "urls.jsonl"
    path.write_text('{"url": "photos/00.png"}\n{"caption": "no address"}\nno json\n')
    (one,) = find(str(path)).shards
    assert keys(one) == ["photos/00.png", "row 2", "row 3"]
    with one.opened() as (images, _), pytest.raises(QLIPError, match="row 2: names no image"):
        images.read(1)


def test_stores_are_read_by_address(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    shard(tmp_path / "s.tar", range(5))
    table(tmp_path / "t.parquet", 6, 3)
    folder(tmp_path / "photos", 2)
    (tmp_path / "list.txt").write_text("photos/01.png\nphotos/07.png\n")
    with serving(tmp_path) as server:
        (tar,) = find(f"{server.address}/s.tar").shards
        assert keys(tar) == [f"{n:04d}" for n in range(5)]  # no index beside it: it is fetched whole
        with tar.opened() as (images, _):
            assert images.read(3).label == "odd 3"
        one, two = find(f"{server.address}/t.parquet", shard_size=3).shards
        with two.opened() as (images, positions):
            assert images.read(positions[1]).image == encoded(4)
        (listed,) = find(f"{server.address}/list.txt").shards
        with listed.opened() as (images, positions):
            images.prefetch(positions)
            assert images.read(0).image == encoded(1)
            with pytest.raises(QLIPError, match="no such file"):
                images.read(1)
        server.fault = lambda request: "403"
        with pytest.raises(QLIPError, match="no permission .*; check the credentials for this store"):
            find(f"{server.address}/t.parquet")


@pytest.mark.parametrize("ranges", [True, False])
def test_remote_tar__needs_no_ranges_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    """Python's own web server, for instance, ignores ranges; a copy without a name is gone with its process."""
    pytest.importorskip("aiohttp")
    shard(tmp_path / "s.tar", range(5))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with serving(tmp_path) as server:
        faults = ["cut", "500", "drop", "cut"]

        def fault(request: Request) -> str | None:
            wanted = faults.pop() if request.method == "GET" and faults else None
            return wanted if ranges or wanted else "whole"

        server.fault = fault
        monkeypatch.setattr("qlip.data.storage.retry.FIRST_WAIT", 0.001)
        (tar,) = find(f"{server.address}/s.tar").shards
        with tar.opened() as (images, _):
            assert not list(temporary.iterdir())
            assert [images.read(index).image for index in range(5)] == [encoded(index) for index in range(5)]
        resumed = [request.span for request in server.gets() if request.span]
        assert resumed and all(span[0] > 0 for span in resumed) and not faults


def test_far_tables_are_looked_at_several_at_a_time_and_stay_in_order(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    for number in range(4):
        table(tmp_path / f"{number}.parquet", 2 + number, 10)
    with serving(tmp_path) as server:
        meeting = threading.Barrier(4, timeout=20)
        met: set[str] = set()

        def wait_for_the_others(request: Request) -> None:
            if request.path not in met:
                met.add(request.path)
                meeting.wait()

        server.fault = wait_for_the_others
        far = find(f"{server.address}/{{0..3}}.parquet", storage=Storage(RetryPolicy(tries=1, timeout=60)))
    near = find(str(tmp_path / "*.parquet"))
    assert [(one.name, one.count, one.digest) for one in far.shards] == [
        (one.name, one.count, one.digest) for one in near.shards
    ]


def test_another_input_is_told_apart_by_what_differs(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos")
    record = find(str(photos), shard_size=3).record()
    assert SourceRecord.from_json(record.to_json().encode(), "x") == record

    def difference(**options: object) -> str | None:
        return record.difference(find(str(photos), **{"shard_size": 3} | options).record())  # type: ignore[arg-type]

    assert difference() is None
    assert difference(shard_size=4) == "it was made with --shard-size 3, not 4"
    photos.rename(tmp_path / "elsewhere")
    photos = tmp_path / "elsewhere"
    assert difference() is None
    (photos / "03.png").rename(photos / "03b.png")
    assert difference() == "input shard 1 was another 'pictures 3 to 5'"
    (photos / "00.png").unlink()
    assert difference() == "it was made of 3 input shards, not of 2"
    shard(tmp_path / "s.tar", range(2))
    assert record.difference(find(str(tmp_path / "s.tar")).record()) == "it was made of a folder, not of tar files"


def test_several_public_sets_are_one_input_and_their_keys_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("train", 5), ("test", 2)):
        folder(tmp_path / name, count)
    monkeypatch.setattr(inputs, "open_named", lambda name: FolderImages(tmp_path / name.partition(":")[2]))
    inputs._set.cache_clear()
    found = find(["cifar10:train", "cifar10:test"], shard_size=4)
    assert (found.kind, found.num_images) == ("set", 7)
    assert [one.name for one in found.shards] == ["cifar10:train 0 to 3", "cifar10:train 4 to 4", "cifar10:test 0 to 1"]
    assert keys(found.shards[2]) == ["cifar10:test/00.png", "cifar10:test/01.png"]
    with found.shards[1].opened() as (images, positions):
        assert [images.read(position).key for position in positions] == ["cifar10:train/04.png"]
    assert keys(find("cifar10:test").shards[0]) == ["00.png", "01.png"]
    with pytest.raises(QLIPError, match="different public datasets"):
        find(["cifar10:train", "cifar10:train"])
    inputs._set.cache_clear()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "no such folder"),
        ("nowhere/*.tar", "matches nothing"),
        ("cifar10:tset", "no such split"),
        ("photos/00.png", "one file; give its folder, or use `qlip encode`"),
        ("tars", r"holds .tar files and no images; write 'tars/\*.tar'"),
        ("empty.txt", "no URL in it"),
        ("wrong.csv", "no column url, image, path or file with URLs"),
        ("notes.parquet", "cannot be read"),
    ],
)
def test_what_is_no_input_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "photos", 1)
    write_tar(tmp_path / "tars" / "a.tar", [("a.png", encoded(1))])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "notes.parquet").write_text("no table")
    with pytest.raises(QLIPError, match=message) as raised:
        find(given)
    assert "\n" not in str(raised.value)


def test_missing_credentials_are_said_to_be_missing() -> None:
    from qlip.data.storage.retry import DeniedError, RetryPolicy, StorageError, final_error

    class NoCredentialsError(OSError):
        """As the cloud's client has it."""

    error = final_error("s3://bucket/x.tar", NoCredentialsError("Unable to locate credentials"), RetryPolicy(), 1.0)
    assert isinstance(error, StorageError)  # nothing there can be read, so no image is called broken for it
    assert isinstance(error, DeniedError)  # nor of another shard
    assert str(error).startswith("s3://bucket/x.tar: no credentials (Unable to locate credentials); set them")
    with pytest.raises(QLIPError, match="another package: pip install|no credentials|no permission|gave up"):
        find("s3://no-such-bucket-of-ours/x.parquet", storage=Storage(RetryPolicy(tries=1, timeout=2, longest_wait=0)))


def test_a_store_is_a_file_to_a_library(tmp_path: Path) -> None:
    from qlip.data.storage.remote_file import RemoteFile

    (tmp_path / "f").write_bytes(bytes(range(100)))
    file = io.BufferedReader(RemoteFile(Storage(), str(tmp_path / "f")), 16)
    assert file.read(10) == bytes(range(10)) and file.tell() == 10
    file.seek(-5, io.SEEK_END)
    assert file.read() == bytes(range(95, 100)) and file.read() == b""


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.txt", "a.jsonl"])
def test_find__a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(QLIPError, match=f"{name}: not a regular file but a pipe"), ExitStack() as stack:
        stack.enter_context(find(str(tmp_path / name)).shards[0].opened())


def test_find__a_pipe_beside_an_image_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(folder(tmp_path / "photos", 2) / "00.json")
    with find(str(tmp_path / "photos")).shards[0].opened() as (images, _):
        assert [images.read(n).captions for n in range(2)] == [("image 0",), ("image 1",)]


def test_find__pipes_and_devices_in_a_tar_are_no_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(1))])
    with tarfile.open(tmp_path / "x.tar", "a") as file:
        for name, kind in (("b.png", tarfile.FIFOTYPE), ("c.png", tarfile.CHRTYPE), ("d.png", tarfile.BLKTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            file.addfile(member)
    assert keys(find(str(tmp_path / "x.tar")).shards[0]) == ["a"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_find__a_broken_parquet_file_fails_alone(tmp_path: Path, damage: str) -> None:
    for name in "abc":
        table(tmp_path / f"{name}.parquet", 4, 2)
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes({"cut": data[:-40], "empty": b"", "text": b"no table"}[damage])
    found = find(f"{tmp_path}/*.parquet")
    assert [(one.name, one.count) for one in found.shards] == [("a.parquet", 4), ("b.parquet", None), ("c.parquet", 4)]
    assert keys(found.shards[2])[0] == "c-000000"
    with pytest.raises(QLIPError, match=r"b\.parquet: cannot be read"):
        keys(found.shards[1])
    for name in "ac":
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(QLIPError, match=r"a\.parquet: cannot be read"):
        find(f"{tmp_path}/*.parquet")
