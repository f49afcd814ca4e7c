"""A cache of its own for each test, and a folder of archives instead of a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.data.public.fetch import ARCHIVES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(ARCHIVES, str(tmp_path / "archives"))
    (tmp_path / "archives").mkdir()
    return tmp_path / "cache"
