"""What the modeling tests share: one thread, and the stored fixtures."""

from __future__ import annotations

import pytest
import torch

from tests.modeling.helpers import MODEL_FIXTURES, StoredModel, load_fixture


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=MODEL_FIXTURES)
def stored(request: pytest.FixtureRequest) -> StoredModel:
    """Each stored model in turn, with its inputs, outputs and gradients."""
    return load_fixture(request.param)
