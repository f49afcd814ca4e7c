"""Fixtures of the tests of `qlip.hf`: the bundled model, ours and transformers', and its inputs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip import QLIPModel, QLIPProcessor, assets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason='needs pip install "qlip[hf]"')


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(assets.path("images").glob("*.jpg"))[:3]]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["a photo of a cat", "two trucks at night"]


@pytest.fixture(scope="session")
def ours() -> QLIPModel:
    return QLIPModel.from_pretrained("bundled")


@pytest.fixture(scope="session")
def theirs() -> Any:
    from qlip.hf import QLIPHFModel

    return QLIPHFModel.from_pretrained("bundled", dtype=torch.float32)


@pytest.fixture(scope="session")
def inputs(images: list[Image.Image], texts: list[str]) -> dict[str, Tensor]:
    return dict(QLIPProcessor.from_pretrained("bundled")(images=images, text=texts))
