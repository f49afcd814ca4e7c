"""Files by address: the same bytes from a disk and from a store that fails on purpose, or one clear line."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from qlip.data.storage.chunked_reader import ChunkedReader, open_reader
from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import RETRIES, DeniedError, MissingError, RetryPolicy, StorageError, unreadable
from qlip.data.storage.storage import Storage, is_remote, join, split
from qlip.errors import QLIPError

from .objects import QUICK, ObjectServer, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    (tmp_path / "objects").mkdir()
    with serving(tmp_path / "objects") as found:
        yield found


@pytest.fixture
def content(server: ObjectServer) -> bytes:
    data = random.Random(0).randbytes(300_000)
    (server.folder / "a.bin").write_bytes(data)
    RETRIES.take()
    return data


def test_ranges_and_whole_files_are_the_same_from_disk_and_store(server: ObjectServer, content: bytes) -> None:
    storage = Storage(QUICK)
    for address in (f"{server.address}/a.bin", str(server.folder / "a.bin"), f"file://{server.folder}/a.bin"):
        assert storage.size(address) == len(content)
        assert storage.read(address) == content
        assert storage.read(address, 1000, 77) == content[1000:1077]
        assert storage.read(address, 5, 0) == b""
        assert storage.read_up_to(address, 10) == content[:10]
        assert storage.read_up_to(address, 10**6) == content
        assert storage.prefetch(address, 3, 4).result() == content[3:7]
        assert storage.exists(address) and not storage.exists(address + "x")
    assert RETRIES.take() == 0


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "cut", "short", "slow"])
def test_a_request_that_fails_is_made_again_and_counted(server: ObjectServer, content: bytes, fault: str) -> None:
    number = itertools.count()
    server.fault = lambda request: fault if next(number) < 2 else None
    assert Storage(QUICK).read(f"{server.address}/a.bin", 100, 1000) == content[100:1100]
    assert RETRIES.take() == (1 if fault == "drop" else 2) and len(server.requests) == 3  # aiohttp mends a drop itself


def test_a_size_that_fails_is_asked_again_too(server: ObjectServer, content: bytes) -> None:
    """fsspec calls every fault of that request "not found"."""
    number = itertools.count()
    server.fault = lambda request: "500" if next(number) < 4 else None
    assert Storage(QUICK).size(f"{server.address}/a.bin") == len(content)
    assert RETRIES.take() == 2


@pytest.mark.parametrize(
    ("fault", "reason"), [("503", "503"), ("drop", "isconnect"), ("slow", "no answer within 0.1 s"), ("short", "bytes")]
)
def test_patience_ends_with_one_line(server: ObjectServer, content: bytes, fault: str, reason: str) -> None:
    server.fault = lambda request: fault
    storage = Storage(RetryPolicy(tries=3, timeout=0.1, longest_wait=0.01))
    with pytest.raises(StorageError) as caught:
        storage.read(f"{server.address}/a.bin", 0, 10)
    text = str(caught.value)
    assert text.startswith(f"{server.address}/a.bin: gave up after 3 tries in ") and reason in text and "\n" not in text
    assert len(server.requests) == (6 if fault == "drop" else 3) and RETRIES.take() == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "no such file; check the address"),
        ("403", "no permission (403 Forbidden); check the credentials for this store"),
        ("400", "400 Bad Request; check the address"),
        ("501", "501 Not Implemented; check the address"),
        ("whole", "the store ignores ranges and sends whole files"),
    ],
)
def test_what_no_patience_mends_is_said_at_once(server: ObjectServer, content: bytes, fault: str, message: str) -> None:
    server.fault = lambda request: fault
    with pytest.raises(QLIPError) as caught:
        Storage(QUICK).read(f"{server.address}/a.bin", 5, 10)
    assert message in str(caught.value) and not isinstance(caught.value, StorageError)
    assert len(server.requests) == 1 and RETRIES.take() == 0


def test_waits_grow_and_differ(server: ObjectServer, content: bytes) -> None:
    """Full jitter: over many requests the waits before a second try spread over the whole range."""
    times: list[float] = []
    server.fault = lambda request: times.append(time.monotonic()) or "500"  # type: ignore[func-returns-value]
    waits: list[list[float]] = []
    for _ in range(6):
        times.clear()
        with pytest.raises(StorageError):
            Storage(RetryPolicy(tries=3, longest_wait=0.2)).read(f"{server.address}/a.bin", 0, 10)
        waits.append([after - before for before, after in itertools.pairwise(times)])
    assert all(wait < 0.3 for pair in waits for wait in pair)
    assert max(pair[0] for pair in waits) - min(pair[0] for pair in waits) > 0.02


def test_addresses_that_make_no_sense(tmp_path: Path) -> None:
    storage = Storage(RetryPolicy(tries=1, timeout=2))
    for address, message in (
        ("nosuch://bucket/x.tar", "Protocol not known: nosuch; give a path, or an address such as s3:// or https://"),
        ("http://127.0.0.1:1/x.tar", "gave up after 1 tries"),
        (str(tmp_path / "x.tar"), "No such file or directory; check the path"),
        (str(tmp_path), "Is a directory"),
    ):
        with pytest.raises(QLIPError) as caught:
            storage.read(address, 0, 10)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_local_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x")
    (tmp_path / "x.tar").chmod(0)
    with pytest.raises(DeniedError, match="Permission denied"):
        Storage().read(str(tmp_path / "x.tar"))


def test_what_may_not_be_read_is_told_from_what_is_broken(server: ObjectServer, content: bytes) -> None:
    assert isinstance(unreadable("x.tar", PermissionError(13, "Permission denied")), DeniedError)
    assert str(unreadable("x.tar", OSError(5, "Input/output error"))) == "x.tar: Input/output error; check the path"
    for fault in ("401", "403"):
        server.fault = lambda request, fault=fault: fault  # type: ignore[misc]
        with pytest.raises(DeniedError, match=f"a.bin: no permission .{fault}.*; check the credentials for this store"):
            Storage(QUICK).read(f"{server.address}/a.bin")


class ClientError(Exception):
    """As a cloud's own client raises it."""


class FailingStore(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Raises what stores of other protocols raise."""

    protocol = "failing"
    raised: ClassVar[list[BaseException]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        del path, kwargs
        if self.raised:
            error = self.raised.pop(0)
            raise error from ClientError("the cloud's own words")
        return bytes((end or 1) - (start or 0))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (OSError(5, "Please reduce your request rate"), None, ""),
        (TimeoutError(), None, ""),
        (FileNotFoundError("The specified key does not exist."), MissingError, "no such file"),
        (PermissionError("Forbidden"), DeniedError, "no permission (Forbidden)"),
        (IsADirectoryError("x"), QLIPError, "x; check the address"),
        (KeyError("a fault of the program"), KeyError, ""),
    ],
)
def test_other_stores_errors_are_told_apart(raised: BaseException, kind: type[BaseException], message: str) -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.raised[:] = [raised]
    RETRIES.take()
    if kind is None:
        assert Storage(QUICK).read("failing://bucket/x", 0, 8) == bytes(8) and RETRIES.take() == 1
        return
    with pytest.raises(kind) as caught:
        Storage(QUICK).read("failing://bucket/x", 0, 8)
    assert message in str(caught.value) and not isinstance(caught.value, StorageError) and RETRIES.take() == 0


def test_memory_is_a_store_too() -> None:
    storage = Storage(QUICK)
    storage.write("memory://bucket/b.bin", b"abcdef")
    storage.write("memory://bucket/sub/c.bin", b"x")
    assert storage.read("memory://bucket/b.bin", 2, 3) == b"cde"
    assert storage.size("memory://bucket/b.bin") == 6
    assert storage.glob("memory://bucket/*.bin") == ["memory:///bucket/b.bin"]
    assert storage.find("memory://bucket") == ["b.bin", "sub/c.bin"]
    with pytest.raises(MissingError, match="no such file"):
        storage.read("memory://bucket/none")


def test_names_of_folders_and_files() -> None:
    assert is_remote("s3://b/x.tar") and not is_remote("file:///x.tar") and not is_remote("/x.tar")
    assert split("https://h/a/b.tar?signature=x/y") == ("https://h/a", "b.tar")
    assert split("/a/b.tar") == ("/a", "b.tar") and split("b.tar") == (".", "b.tar")
    assert join("s3://b/c/", "x") == "s3://b/c/x" and join("file:///c", "x") == "/c/x"


def test_a_storage_pickles_with_its_patience() -> None:
    assert pickle.loads(pickle.dumps(Storage(QUICK))).retry == QUICK


def test_a_window_reads_forwards_with_one_request_a_chunk(server: ObjectServer, content: bytes) -> None:
    window = ChunkedReader(Storage(QUICK), f"{server.address}/a.bin", len(content), chunk=50_000)
    draw, at = random.Random(1), 0
    while at < len(content):
        size = draw.choice((1, 512, 512, 30_000, 120_000))
        assert window(at, size) == content[at : at + size]
        at += size
    assert window(len(content), 512) == b""
    spans = [request.span for request in server.gets()]
    assert sorted(spans) == [(begin, begin + 50_000) for begin in range(0, 300_000, 50_000)]  # type: ignore[type-var]


def test_opened_files_are_read_at_any_place(server: ObjectServer, content: bytes) -> None:
    for address in (f"{server.address}/a.bin", str(server.folder / "a.bin")):
        with open_reader(address, Storage(QUICK)) as (fetch, length):
            assert length == len(content)
            assert fetch(299_990, 100) == content[-10:] and fetch(0, 5) == content[:5]


def test_what_was_announced_is_there_and_old_spans_go(server: ObjectServer, content: bytes) -> None:
    address = f"{server.address}/a.bin"
    ahead = Prefetcher(Storage(QUICK), keep=2)
    spans = [(address, 1000 * n, 1000 * n + 500) for n in range(12)]
    ahead.prefetch(spans[:4])
    ahead.prefetch(spans[4:8])
    for number, span in enumerate(spans[:8]):
        assert ahead.get(span) == content[1000 * number : 1000 * number + 500]
    assert len(server.gets()) == 8
    ahead.prefetch(spans[8:10])
    ahead.prefetch(spans[10:])
    assert len(ahead._spans) == 4  # of the first eight nothing is held
    for number, span in enumerate(spans[8:], 8):  # all have arrived, and so have all requests
        assert ahead.get(span) == content[1000 * number : 1000 * number + 500]
    assert ahead.get(spans[0]) == content[:500] and len(server.gets()) == 13


def test_a_failed_span_is_asked_for_again(server: ObjectServer, content: bytes) -> None:
    ahead, span = Prefetcher(Storage(RetryPolicy(tries=1)), keep=2), (f"{server.address}/a.bin", 0, 10)
    server.fault = lambda request: "500"
    with pytest.raises(StorageError):
        ahead.get(span)
    server.fault = lambda request: None
    assert ahead.get(span) == content[:10]
