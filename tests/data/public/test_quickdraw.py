"""Quick, Draw!, built for real from a small package."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import get, open_named, quickdraw
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

from ..archives import keys, registered


def test_build__classes_take_turns_and_ink_is_black(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickdraw, "TEST_FROM", 3)
    rng = np.random.default_rng(0)
    ink = {name: rng.random((4, 784)).round(3) for name in ("cat", "The Mona Lisa")}
    files = {
        f"src/drawings/{name}.ndjson.gz": gzip.compress("\n".join(json.dumps(row.tolist()) for row in rows).encode())
        for name, rows in ink.items()
    }
    monkeypatch.setattr(quickdraw, "PACKAGE", registered(quickdraw.PACKAGE, files, tmp_path / "archives"))
    get("quickdraw", progress=False)
    train, test = open_named("quickdraw:train"), open_named("quickdraw:test")
    assert keys(train)[:3] == ["The-Mona-Lisa-000", "cat-000", "The-Mona-Lisa-001"] and len(train) == 6
    assert [test.read(index).label for index in range(len(test))] == ["The Mona Lisa", "cat"]
    pixels = np.asarray(load_image(test.read(1).image))[..., 0]
    assert np.array_equal(pixels, np.round(255 * (1 - ink["cat"][3])).reshape(28, 28)), "black on white"
    path = tmp_path / "dog.ndjson.gz"
    for data, message in ((gzip.compress(b"[1, 2]"), "a drawing of 2 numbers"), (b"x", "no compressed lists")):
        path.write_bytes(data)
        with pytest.raises(QLIPError, match=rf"^dog\.ndjson\.gz: {message}"):
            list(quickdraw.read_drawings(path))
