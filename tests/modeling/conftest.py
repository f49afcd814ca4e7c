"""Fixtures of the modeling tests: one thread, the stored models, a checkpoint to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qlip import QLIPProcessor
from tests.modeling.helpers import FIXTURE, MODEL_FIXTURES, StoredModel, load_fixture


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=MODEL_FIXTURES)
def stored(request: pytest.FixtureRequest) -> StoredModel:
    """Each stored model in turn, with its inputs, outputs and gradients."""
    return load_fixture(request.param)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a fixture's checkpoint, to be changed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def processor() -> QLIPProcessor:
    """The processor of a fixture: 32 px, mean and std 0.5, no vocabulary."""
    return QLIPProcessor.from_pretrained(FIXTURE)
