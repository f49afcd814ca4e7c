"""NaN and infinity are refused where they enter and where they leave a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip import QLIPConfig, QLIPError, QLIPModel, QLIPProcessor
from qlip.runtime.finite import is_finite, require_finite
from tests.modeling.helpers import FIXTURE, small_config

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    torch.manual_seed(0)
    return QLIPModel(QLIPConfig.from_dict(small_config())).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite__any_place_and_type(dtype: torch.dtype) -> None:
    for bad in (NAN, INF, -INF):
        for place in (0, 7, 11):
            values = torch.linspace(-1, 1, 12, dtype=dtype)
            assert is_finite(values)
            values[place] = bad
            assert not is_finite(values)
    assert is_finite(torch.empty(0, 3))


def test_require_finite__names_the_first_row() -> None:
    values = torch.zeros(4, 2, 3)
    require_finite(values, "embeddings", "check")
    values[2, 1, 1], values[3] = INF, NAN
    with pytest.raises(QLIPError, match=r"^row 2: embeddings hold infinite values; check$"):
        require_finite(values, "embeddings", "check")
    with pytest.raises(QLIPError, match=r"^cat\.jpg: embeddings hold"):
        require_finite(values, "embeddings", "check", names=["a", "b", "cat.jpg", "d"])
    with pytest.raises(QLIPError, match=r"^the temperature hold NaN; check$"):
        require_finite(torch.tensor(NAN), "the temperature", "check")


CALLS: dict[str, Callable[[QLIPModel, Tensor], Any]] = {
    "encode": QLIPModel.encode,
    "embed_images": QLIPModel.embed_images,
    "get_image_features": QLIPModel.get_image_features,
    "get_patch_features": QLIPModel.get_patch_features,
    "forward": QLIPModel.forward,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("bad", [NAN, INF])
def test_model__pixels_that_are_not_finite_are_refused(
    model: QLIPModel, call: Callable[[QLIPModel, Tensor], Any], bad: float
) -> None:
    pixels = torch.zeros(3, 3, model.image_size, model.image_size)
    pixels[1, 0, 0, 0] = bad
    with pytest.raises(QLIPError, match="row 1: pixel_values hold") as error:
        call(model, pixels)
    assert "\n" not in str(error.value)


def test_model__results_that_are_not_finite_are_refused(model: QLIPModel) -> None:
    """Weights that overflow float16, which are finite as stored."""
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    ids = torch.ones(2, 4, dtype=torch.int64)
    broken = QLIPModel(model.config).eval()
    with torch.no_grad():
        for projection in (broken.visual_projection, broken.text_projection):
            projection.weight.copy_(6e4 * torch.randn(projection.weight.shape).sign())
    broken.half()
    with pytest.raises(QLIPError, match="image features hold .* float16 has too small a range"):
        broken.embed_images(pixels)
    with pytest.raises(QLIPError, match="text features hold"):
        broken.embed_texts(ids)


def test_model__training_is_not_checked(model: QLIPModel) -> None:
    """The Trainer checks its losses, once per step."""
    pixels = torch.full((1, 3, model.image_size, model.image_size), NAN)
    model.train()
    try:
        assert model(pixels).image_embeds.isnan().all()
    finally:
        model.eval()


def test_processor__pixels_that_are_not_finite_become_no_image() -> None:
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1] = NAN
    with pytest.raises(QLIPError, match="row 1: pixels hold NaN"):
        QLIPProcessor.from_pretrained(FIXTURE).to_images(pixels)
