"""Reading front to back by chunks."""

from __future__ import annotations

import random

from qlip.data.storage.chunked_reader import ChunkedReader, open_reader
from qlip.data.storage.storage import Storage

from ..objects import QUICK, ObjectServer


def test_chunked_reader__one_request_per_chunk(server: ObjectServer, content: bytes) -> None:
    window = ChunkedReader(Storage(QUICK), f"{server.address}/a.bin", len(content), chunk=50_000)
    draw, at = random.Random(1), 0
    while at < len(content):
        size = draw.choice((1, 512, 512, 30_000, 120_000))
        assert window(at, size) == content[at : at + size]
        at += size
    assert window(len(content), 512) == b""
    spans = [request.span for request in server.gets()]
    assert sorted(spans) == [(begin, begin + 50_000) for begin in range(0, 300_000, 50_000)]  # type: ignore[type-var]


def test_open_reader__reads_at_any_offset(server: ObjectServer, content: bytes) -> None:
    for address in (f"{server.address}/a.bin", str(server.folder / "a.bin")):
        with open_reader(address, Storage(QUICK)) as (fetch, length):
            assert length == len(content)
            assert fetch(299_990, 100) == content[-10:] and fetch(0, 5) == content[:5]
