"""Retries: what is retried, how long, and the error at the end."""

from __future__ import annotations

import itertools
import time
from typing import ClassVar

import fsspec
import pytest

from qlip.data.storage.retry import RETRIES, DeniedError, MissingError, RetryPolicy, StorageError, unreadable
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

from ..objects import QUICK, ObjectServer


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "cut", "short", "slow"])
def test_retrying__failed_requests_are_repeated_and_counted(server: ObjectServer, content: bytes, fault: str) -> None:
    number = itertools.count()
    server.fault = lambda request: fault if next(number) < 2 else None
    assert Storage(QUICK).read(f"{server.address}/a.bin", 100, 1000) == content[100:1100]
    assert RETRIES.take() == (1 if fault == "drop" else 2) and len(server.requests) == 3  # aiohttp mends a drop itself


def test_retrying__sizes_too(server: ObjectServer, content: bytes) -> None:
    """fsspec calls every fault of that request "not found"."""
    number = itertools.count()
    server.fault = lambda request: "500" if next(number) < 4 else None
    assert Storage(QUICK).size(f"{server.address}/a.bin") == len(content)
    assert RETRIES.take() == 2


@pytest.mark.parametrize(
    ("fault", "reason"), [("503", "503"), ("drop", "isconnect"), ("slow", "no answer within 0.1 s"), ("short", "bytes")]
)
def test_retrying__gives_up_with_one_line(server: ObjectServer, content: bytes, fault: str, reason: str) -> None:
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
def test_retrying__hopeless_requests_fail_at_once(
    server: ObjectServer, content: bytes, fault: str, message: str
) -> None:
    server.fault = lambda request: fault
    with pytest.raises(QLIPError) as caught:
        Storage(QUICK).read(f"{server.address}/a.bin", 5, 10)
    assert message in str(caught.value) and not isinstance(caught.value, StorageError)
    assert len(server.requests) == 1 and RETRIES.take() == 0


def test_retrying__waits_grow_and_differ(server: ObjectServer, content: bytes) -> None:
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


def test_retrying__permission_is_no_broken_file(server: ObjectServer, content: bytes) -> None:
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
def test_final_error__by_the_clients_error(raised: BaseException, kind: type[BaseException], message: str) -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.raised[:] = [raised]
    RETRIES.take()
    if kind is None:
        assert Storage(QUICK).read("failing://bucket/x", 0, 8) == bytes(8) and RETRIES.take() == 1
        return
    with pytest.raises(kind) as caught:
        Storage(QUICK).read("failing://bucket/x", 0, 8)
    assert message in str(caught.value) and not isinstance(caught.value, StorageError) and RETRIES.take() == 0
