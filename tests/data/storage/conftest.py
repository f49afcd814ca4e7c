"""A remote file of random bytes."""

from __future__ import annotations

import random

import pytest

from qlip.data.storage.retry import RETRIES

from ..objects import ObjectServer


@pytest.fixture
def content(server: ObjectServer) -> bytes:
    data = random.Random(0).randbytes(300_000)
    (server.folder / "a.bin").write_bytes(data)
    RETRIES.take()
    return data
