"""Files by address: equal bytes from a disk and from remote storage."""

from __future__ import annotations

import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlip.data.storage.chunked_reader import open_reader
from qlip.data.storage.retry import RETRIES, DeniedError, MissingError, RetryPolicy
from qlip.data.storage.storage import Storage, is_remote, join, split
from qlip.errors import QLIPError

from ..objects import QUICK, ObjectServer


def test_storage__ranges_and_whole_files_equal_the_disks(server: ObjectServer, content: bytes) -> None:
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


def test_storage__threads_read_one_file_where_the_system_has_no_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(0).randbytes(1 << 20)
    (tmp_path / "a.bin").write_bytes(content)
    address, storage = str(tmp_path / "a.bin"), Storage()
    monkeypatch.delattr(os, "pread")  # as on Windows
    offsets = random.Random(1).sample(range(len(content) - 5000), 2000)
    with open_reader(address, storage) as (fetch, length), ThreadPoolExecutor(8) as threads:
        assert length == len(content) and fetch(length - 3, 10) == content[-3:] and fetch(length, 10) == b""
        for read in (fetch, lambda offset, size: storage.read(address, offset, size)):
            found = threads.map(read, offsets, [5000] * len(offsets))
            assert all(data == content[at : at + 5000] for data, at in zip(found, offsets, strict=True))


def test_storage__refuses_impossible_addresses(tmp_path: Path) -> None:
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
def test_storage__a_local_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x")
    (tmp_path / "x.tar").chmod(0)
    with pytest.raises(DeniedError, match="Permission denied"):
        Storage().read(str(tmp_path / "x.tar"))


def test_storage__memory_is_remote_too() -> None:
    storage = Storage(QUICK)
    storage.write("memory://bucket/b.bin", b"abcdef")
    storage.write("memory://bucket/sub/c.bin", b"x")
    assert storage.read("memory://bucket/b.bin", 2, 3) == b"cde"
    assert storage.size("memory://bucket/b.bin") == 6
    assert storage.glob("memory://bucket/*.bin") == ["memory:///bucket/b.bin"]
    assert storage.find("memory://bucket") == ["b.bin", "sub/c.bin"]
    with pytest.raises(MissingError, match="no such file"):
        storage.read("memory://bucket/none")


def test_split_and_join__folders_and_names() -> None:
    assert is_remote("s3://b/x.tar") and not is_remote("file:///x.tar") and not is_remote("/x.tar")
    assert split("https://h/a/b.tar?signature=x/y") == ("https://h/a", "b.tar")
    assert split("/a/b.tar") == ("/a", "b.tar") and split("b.tar") == (".", "b.tar")
    assert join("s3://b/c/", "x") == "s3://b/c/x" and join("file:///c", "x") == "/c/x"


def test_storage__pickles_with_its_retry_policy() -> None:
    assert pickle.loads(pickle.dumps(Storage(QUICK))).retry == QUICK
