"""Spans that are fetched before they are needed."""

from __future__ import annotations

import pytest

from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import RetryPolicy, StorageError
from qlip.data.storage.storage import Storage

from ..objects import QUICK, ObjectServer


def test_prefetcher__holds_announced_spans_and_drops_old_ones(server: ObjectServer, content: bytes) -> None:
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


def test_prefetcher__a_failed_span_is_fetched_again(server: ObjectServer, content: bytes) -> None:
    ahead, span = Prefetcher(Storage(RetryPolicy(tries=1)), keep=2), (f"{server.address}/a.bin", 0, 10)
    server.fault = lambda request: "500"
    with pytest.raises(StorageError):
        ahead.get(span)
    server.fault = lambda request: None
    assert ahead.get(span) == content[:10]
