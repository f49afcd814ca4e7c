"""A cache per test, a folder of archives instead of a network, and a server of remote files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlip.data.public.fetch import ARCHIVES

from .objects import ObjectServer, serving


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(ARCHIVES, str(tmp_path / "archives"))
    (tmp_path / "archives").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "objects").mkdir()
    with serving(tmp_path / "objects") as found:
        yield found
