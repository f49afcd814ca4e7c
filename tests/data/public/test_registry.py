"""The registry of public datasets."""

from __future__ import annotations

import pytest

from qlip.data.public import (
    DATASETS,
    get,
    registry,
)
from qlip.errors import QLIPError


def test_datasets__are_described_and_unknown_names_are_errors() -> None:
    for name, info in DATASETS.items():
        assert info.name == name and info.description and info.licence and (info.splits or info.texts or info.weights)
        if info.build is None:
            assert info.draw is not None and not info.packages and info.download == info.disk == 0
        else:
            assert info.draw is None and info.download > 4_000_000 and info.disk > 10_000_000 and info.origin
    with pytest.raises(QLIPError, match=r"wallpaper: no such dataset \(did you mean 'wallpapers'\?\)"):
        get("wallpaper")


def test_datasets__weights_have_no_splits() -> None:
    for name in ("resnet50", "inception"):
        info = registry.DATASETS[name]
        assert not info.splits and info.weights and info.licence and bool(info.packages) is (name == "resnet50")
