"""Patterns of shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.data import TarImages
from qlip.data.shards.shard_patterns import expand
from qlip.errors import QLIPError

from ..samples import tars


def test_expand__braces_and_globs_in_order(tmp_path: Path) -> None:
    assert expand("x-{000..002}.tar") == ["x-000.tar", "x-001.tar", "x-002.tar"]
    assert expand("{9..11}") == ["9", "10", "11"]
    assert expand("{b,a}/{0..1}.tar") == ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]
    source = tars(tmp_path, 10)
    assert len(source) == 10 and [source.read(i).key for i in (0, 5, 9)] == ["0000", "0005", "0009"]
    again = TarImages(f"{tmp_path}/*.tar")
    assert [again.read(i) for i in range(10)] == [source.read(i) for i in range(10)]
    assert len(TarImages([tmp_path / "tars-01.tar", tmp_path / "tars-00.tar"])) == 10
    with pytest.raises(QLIPError, match="runs backwards; write {1..3}"):
        expand("{3..1}.tar")
    with pytest.raises(QLIPError, match="matches nothing"):
        expand(f"{tmp_path}/none-*.tar")
    with pytest.raises(QLIPError, match="more than 1000000 files"):
        expand("{0..9999}{0..9999}")
