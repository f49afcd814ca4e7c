"""Documents are stored in a cache of the tests' own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path_factory.getbasetemp() / "um3-cache"))
