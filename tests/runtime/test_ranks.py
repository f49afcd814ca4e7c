"""Rank and world size come from torchrun's environment variables."""

from __future__ import annotations

import pytest

from qlip.runtime.ranks import is_first_rank, local_rank, rank, world_size


def test_ranks__alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), local_rank(), world_size(), is_first_rank()) == (0, 0, 1, True)


def test_ranks__as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (rank(), local_rank(), world_size(), is_first_rank()) == (5, 1, 8, False)
