"""The loader's benchmark compares equal work: the same bytes, pixels and tokens from both, or it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.loader import Row, Setting, check_equal, compare, table, write_shards

TINY = Setting(samples=16, shards=2, side=32, size=24, batch_size=4, workers=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), TINY)


@pytest.mark.parametrize("size", [24, 8, 40])
def test_both_give_the_same_pixels_and_tokens(shards: list[str], size: int) -> None:
    check_equal(shards, replace(TINY, size=size))


def test_a_difference_would_be_found(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STD", (0.3, 0.3, 0.3 + 1e-6))
    theirs = loader.to_tensor

    def other(image: loader.Image.Image, size: int) -> loader.Tensor:
        return theirs(image, size) * 1.0000001

    monkeypatch.setattr(loader, "to_tensor", other)
    with pytest.raises(AssertionError, match="other pixels or tokens"):
        check_equal(shards, TINY)


@pytest.mark.parametrize("what", ["read", "decode"])
def test_both_are_timed_in_turns(shards: list[str], what: str) -> None:
    row = compare(what, shards, TINY, rounds=2, batches_per_round=2)
    assert {name: len(rates) for name, rates in row.rates.items()} == {"webdataset": 2, "qlip": 2}
    assert row.ratio > 0


def test_misses_are_written_too() -> None:
    rows = [
        Row("read", TINY, {"webdataset": [100.0, 300.0, 200.0], "qlip": [500.0, 100.0, 450.0]}),
        Row("decode", TINY, {"webdataset": [100.0], "qlip": [110.0]}),
    ]
    text = table(rows, 3)
    assert "| 32 | 0 | bytes and captions | 200 | 450 | 2.25x | 2.0x | yes |" in text
    assert "| 32 | 0 | decoded batches | 100 | 110 | 1.10x | 1.2x | **no** |" in text
    page = Path(loader.README).read_text()
    assert page.count(loader.BEGIN) == page.count(loader.END) == 1
