"""The cache of public datasets: written once as a whole, and read with clear errors."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlip.data import TarImages
from qlip.data.public import DATASETS, cache_folder, get, open_named, read_manifest, registry
from qlip.data.public.builder import Builder
from qlip.data.public.cache import building
from qlip.errors import QLIPError
from qlip.registry import Registry

from ..archives import keys
from ..samples import encoded


def test_get__twice_is_instant_and_changes_nothing(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, tmp_path: Path
) -> None:
    folder = get("cifar10", progress=False)
    assert folder == cache / "datasets" / "cifar10" == cache_folder() / "datasets" / "cifar10"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(tmp_path / "archives")  # nothing left to fetch from
    start = time.perf_counter()
    assert get("cifar10", progress=False) == folder
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_building__interrupted_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(builder: Builder) -> None:
        builder.split("train").add("a", "png", encoded(0))
        raise KeyboardInterrupt

    datasets = Registry("dataset", {"cifar10": replace(DATASETS["cifar10"], build=interrupted)})
    monkeypatch.setattr(registry, "DATASETS", datasets)
    with pytest.raises(KeyboardInterrupt):
        get("cifar10", progress=False)
    assert list((cache / "datasets").iterdir()) == [] and read_manifest("cifar10") is None


def test_building__the_first_of_two_processes_wins_and_rubbish_is_replaced(cache: Path) -> None:
    with building("some", quiet=True) as slow:
        with building("some", quiet=True) as fast:
            fast.split("train").add("fast", "png", encoded(0))
            fast.finish("some", "free")
        slow.split("train").add("slow", "png", encoded(0))
        slow.finish("some", "free")
    place = cache / "datasets" / "some"
    assert keys(TarImages(f"{place}/train-*.tar")) == ["fast"]
    (place / "manifest.json").unlink()
    with building("some", quiet=True) as builder:
        builder.split("train").add("new", "png", encoded(0))
        builder.finish("some", "free")
    assert keys(TarImages(f"{place}/train-*.tar")) == ["new"]


def test_get__names_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QLIPError, match="set QLIP_CACHE to a folder you may write to"):
        get("cifar10", cache_dir=tmp_path / "file", progress=False)


def test_open_named__names_a_broken_manifest(cache: Path) -> None:
    path = cache / "datasets" / "emoji" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(QLIPError, match=r"manifest.json: cannot be read .*remove the folder and get the dataset again"):
        open_named("emoji:train")
