"""The package's decoders: their sizes, and what their cards say."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from qlip import assets


@pytest.mark.parametrize("name", assets.BUNDLED_DECODERS)
def test_bundled__is_small_and_in_half_precision(name: str) -> None:
    folder = assets.path(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", assets.BUNDLED_DECODERS)
def test_bundled__card_says_what_it_cannot_do(name: str) -> None:
    card = assets.path(name, "README.md").read_text(encoding="utf-8")
    for part in ("## What it cannot do", "## How it was made", "## Data and licences", "license: apache-2.0"):
        assert part in card
