"""Documents are stored in a cache of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.um3.chats import save_um3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path_factory.getbasetemp() / "um3-cache"))


@pytest.fixture(scope="session")
def um3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny UM3 that can chat."""
    return save_um3(tmp_path_factory.mktemp("um3") / "um3")
