"""`qlip data list` and `qlip data get`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.data import public
from tests.cli.conftest import Command


def test_data_list__names_the_public_datasets(qlip: Command) -> None:
    report = qlip("data", "list", "--cache", "nothing-here", "--json").json
    assert report["cache"] == "nothing-here"
    assert {one["name"] for one in report["results"]} >= {"cifar10", "emoji", "clipart"}
    assert [one["name"] for one in report["results"] if one["here"]] == ["scenes"]  # drawn when read, without a cache
    assert "cifar10" in qlip("data", "list").out


def test_data_get__says_size_packages_and_licence_before_it_fetches(
    qlip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "get", lambda name, cache, progress: cache / name)
    ran = qlip("data", "get", "clipart", "inception", "anarchism", "--cache", tmp_path)
    assert "clipart: fetching 156 MB from apt-get openclipart-png, openclipart-svg; licence: " in ran.err
    assert "anarchism: fetching 7 MB from apt-get anarchism; licence: GPL-2, the texts too\n" in ran.err
    assert "inception: fetching 96 MB from https://github.com/" in ran.err and ran.out.count("\n") == 3
