"""`qlip data list`."""

from __future__ import annotations

from tests.cli.conftest import Command


def test_data_list__names_the_public_datasets(qlip: Command) -> None:
    report = qlip("data", "list", "--cache", "nothing-here", "--json").json
    assert report["cache"] == "nothing-here"
    assert {one["name"] for one in report["results"]} >= {"cifar10", "emoji", "clipart"}
    assert [one["name"] for one in report["results"] if one["here"]] == ["scenes"]  # drawn when read, without a cache
    assert "cifar10" in qlip("data", "list").out
