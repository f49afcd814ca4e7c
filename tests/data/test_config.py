"""The data section of a recipe: strict validation, and sources opened as described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlip.data import FolderImages, TarImages, batches
from qlip.data.config import DataConfig, SourceConfig
from qlip.data.image_feed import open_stream
from qlip.errors import QLIPError, validate
from qlip.modeling import Preprocessing

from .samples import folder, tars, tokenize


def error_of(source: dict[str, Any], **data: Any) -> str:
    with pytest.raises(QLIPError) as caught:
        validate(DataConfig, {"sources": [source], **data}, "recipe.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "x", "wieght": 2}, "unknown key 'sources.0.wieght' (did you mean 'weight'?)"),
        ({"path": "x", "crop_scales": [0, 1]}, "(did you mean 'crop_scale'?)"),
        ({}, "give either 'name' (a public dataset, such as cifar10:train) or 'path', not both"),
        ({"name": "a:b", "path": "x"}, "not both"),
        ({"path": "x", "weight": 0}, "weight: Input should be greater than 0, got 0"),
        ({"path": "x", "weight": float("inf")}, "finite"),
        ({"path": "x", "flip": 2}, "less than or equal to 1, got 2"),
        ({"path": "x", "resample": "nearest"}, "'bilinear', 'bicubic' or 'lanczos', got 'nearest'"),
        ({"path": "x", "crop_scale": [1, 0.5]}, "crop_scale [1.0, 0.5] runs backwards; write [0.5, 1.0]"),
        ({"path": "x", "crop_scale": [0, 1]}, "greater than 0"),
        ({"path": "x", "captions": False, "templates": "cifar"}, "ignores all captions"),
        ({"name": "cifar10:train", "caption_field": "alt"}, "'caption_field' goes with 'path'"),
    ],
)
def test_source_config__errors_say_the_remedy(source: dict[str, Any], message: str) -> None:
    assert message in error_of(source)


def test_data_config__names_a_wrong_key() -> None:
    assert "unknown key 'num_worker' (did you mean 'num_workers'?)" in error_of({"path": "x"}, num_worker=2)
    with pytest.raises(QLIPError, match="at least 1 item"):
        validate(DataConfig, {"sources": []}, "recipe.yaml")


def test_source_config__is_frozen() -> None:
    with pytest.raises(ValidationError):
        SourceConfig(path="x").weight = 3.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar:train",
            "cifar: no such dataset (did you mean 'cifar10'?); there are cifar10, emoji, clipart, wallpapers",
        ),
        ("cifar10:tain", "cifar10:tain: no such split (did you mean 'cifar10:train'?)"),
        ("emoji", "; there are emoji:train, emoji:test, emoji:twemoji, emoji:twemoji-heldout"),
        ("clipart:train", "fetch it with `qlip data get clipart`"),
    ],
)
def test_source_config__a_dataset_that_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path))
    with pytest.raises(QLIPError) as caught:
        SourceConfig(name=name).open()
    assert message in str(caught.value)


def test_open_path__folders_or_tars(tmp_path: Path) -> None:
    tars(tmp_path, 6)
    folder(tmp_path / "f")
    assert isinstance(SourceConfig(path=str(tmp_path / "f")).open(), FolderImages)
    for pattern in ("tars-{00..01}.tar", "tars-*.tar", "{tars-00.tar,tars-01.tar}"):
        source = SourceConfig(path=f"{tmp_path}/{pattern}").open()
        assert isinstance(source, TarImages) and len(source) == 6
    with pytest.raises(QLIPError, match="neither a folder nor a .tar file"):
        SourceConfig(path=str(tmp_path / "f" / "000.jpg")).open()
    with pytest.raises(QLIPError, match="no such folder"):
        SourceConfig(path=str(tmp_path / "g")).open()


def test_open_stream__as_described(tmp_path: Path) -> None:
    tars(tmp_path, 10)
    folder(tmp_path / "f")
    values = {
        "sources": [
            {"path": f"{tmp_path}/tars-*.tar", "weight": 1, "templates": "cifar", "crop_scale": [0.5, 0.5]},
            {"path": str(tmp_path / "f"), "weight": 3, "captions": False, "resample": "lanczos", "flip": 0.5},
        ]
    }
    config = validate(DataConfig, values, "recipe.yaml")
    shown = Preprocessing((8, 12), None, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    stream = open_stream(config, 1, shown, tokenize)
    first, second = stream.sources
    assert first.transform.crop_scale == (0.5, 0.5) and len(first.templates) == 18 and first.captions
    assert second.transform.resample == "lanczos" and second.transform.flip == 0.5 and not second.captions
    assert second.transform.mean == (0.5, 0.4, 0.3) and second.transform.std == (0.1, 0.2, 0.3)
    assert stream.mixture.slots == [250, 750]
    batch = next(iter(batches(stream, 16)))
    assert batch.pixel_values.shape == (16, 3, 8, 12)
    assert 0 < int(batch.has_caption.sum()) < 16
