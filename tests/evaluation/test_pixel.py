"""Metrics against scikit-image, torchmetrics, and what they must be whatever the implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from qlip import QLIPError, assets
from qlip.evaluation.metrics.pixel import _similarity, blurred, gaussian, l1, ms_ssim, psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")


@cache
def pairs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Photographs, and what noise, a blur, a shift of colours, and nothing at all make of them."""
    paths = sorted(assets.path("images").glob("*.jpg"))[:5]
    images = [Image.open(path).convert("RGB").resize((width, height)) for path in paths]
    originals = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255
    rebuilt = originals.clone()
    rebuilt[0] += 0.1 * torch.randn(rebuilt[0].shape, generator=torch.Generator().manual_seed(0))
    rebuilt[1] = (rebuilt[1] + rebuilt[1].roll(3, 1) + rebuilt[1].roll(2, 2)) / 3
    rebuilt[2] = rebuilt[2].roll(1, 0)
    rebuilt[3] = 1 - rebuilt[3]
    return rebuilt.clamp(0, 1), originals


@pytest.mark.parametrize(("height", "width"), [(64, 64), (11, 40), (180, 203)])
def test_pixel__ssim_is_torchmetrics(height: int, width: int) -> None:
    rebuilt, originals = pairs(height, width)
    # in float64: torchmetrics' own float32 is 1e-5 away from it
    expected = structural_similarity_index_measure(
        rebuilt.double(), originals.double(), data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(ssim(rebuilt, originals), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(176, 176), (256, 201)])
def test_pixel__ms_ssim_is_torchmetrics(height: int, width: int) -> None:
    rebuilt, originals = pairs(height, width)
    expected = multiscale_structural_similarity_index_measure(
        rebuilt.double(), originals.double(), data_range=1.0, reduction="none"
    ).float()
    found = ms_ssim(rebuilt, originals)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert found[3] == 0 and found[4] == pytest.approx(1)  # a negative is nothing like it; itself is all like it


def test_pixel__ssim_is_scikit_images_where_the_window_fits() -> None:
    maps, _ = _similarity(*pairs(64, 80))
    for found, rebuilt, original in zip(maps, *pairs(64, 80), strict=True):
        expected = skimage_metrics.structural_similarity(
            rebuilt.double().numpy(),
            original.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(found[:, 5:-5, 5:-5].double().mean()) == pytest.approx(expected, abs=1e-5)


def test_pixel__psnr_and_l1_are_scikit_images_and_numpys() -> None:
    rebuilt, originals = pairs(33, 20)
    for number in range(4):
        arrays = rebuilt[number].double().numpy(), originals[number].double().numpy()
        expected = skimage_metrics.peak_signal_noise_ratio(arrays[1], arrays[0], data_range=1.0)
        assert float(psnr(rebuilt, originals)[number]) == pytest.approx(expected, abs=1e-9)
        assert float(l1(rebuilt, originals)[number]) == pytest.approx(np.abs(arrays[0] - arrays[1]).mean(), abs=1e-6)
    assert torch.isinf(psnr(rebuilt, originals)[4]) and l1(rebuilt, originals)[4] == 0


@pytest.mark.parametrize("metric", [psnr, ssim, l1, ms_ssim])
def test_pixel__an_images_metric_is_its_own(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    rebuilt, originals = pairs(180, 203)
    whole = metric(rebuilt, originals)
    for number in range(len(rebuilt)):
        alone = metric(rebuilt[number : number + 1], originals[number : number + 1])
        torch.testing.assert_close(alone[0], whole[number], atol=1e-7, rtol=1e-7)
    assert metric(rebuilt[:0], originals[:0]).shape == (0,)


@given(st.integers(0, 2**31), st.floats(0.01, 0.2), st.floats(1.5, 3))
@settings(max_examples=20, deadline=None)
def test_pixel__more_noise_is_worse(seed: int, amount: float, times: float) -> None:
    _, originals = pairs(64, 64)
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(seed)) * amount
    little, much = (originals + noise).clamp(0, 1), (originals + times * noise).clamp(0, 1)
    assert (psnr(little, originals) > psnr(much, originals)).all()
    assert (ssim(little, originals) > ssim(much, originals)).all()
    assert (l1(little, originals) < l1(much, originals)).all()
    torch.testing.assert_close(ssim(little, originals), ssim(originals, little), atol=1e-6, rtol=0)


def test_pixel__sums_of_shifts_are_a_convolution() -> None:
    maps = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(3))
    window = gaussian(4, 1.2)
    assert sum(window) == pytest.approx(1) and window == window[::-1]
    kernel = torch.outer(torch.tensor(window), torch.tensor(window))[None, None]
    expected = torch.nn.functional.conv2d(maps.flatten(0, 1)[:, None], kernel).view(2, 3, 12, 22)
    torch.testing.assert_close(blurred(maps, window), expected, atol=1e-6, rtol=0)


def test_pixel__what_does_not_fit_is_refused() -> None:
    small = torch.rand(1, 3, 175, 300)
    with pytest.raises(QLIPError, match=r"^300x175 pixels are too few for MS-SSIM's five scales: 176 a side at least"):
        ms_ssim(small, small)
    tiny = torch.rand(1, 3, 64, 10)
    with pytest.raises(QLIPError, match="^10x64 pixels are too few for SSIM: 11 a side at least; leave it out$"):
        ssim(tiny, tiny)
    for metric in (psnr, ssim, ms_ssim, l1):
        with pytest.raises(QLIPError, match="are no pairs"):
            metric(torch.rand(2, 3, 200, 200), torch.rand(3, 3, 200, 200))


@pytest.mark.parametrize("metric", [psnr, ssim, l1])
def test_pixel__pixels_that_are_not_finite_are_refused(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    whole = torch.full((2, 3, 16, 16), 0.5)
    for bad in (torch.nan, torch.inf):
        broken = whole.clone()
        broken[1, 0, 0, 0] = bad
        for pair in ((broken, whole), (whole, broken)):
            with pytest.raises(QLIPError, match="^row 1: pixels hold"):
                metric(*pair)


def test_pixel__what_is_no_float_tensor_is_refused() -> None:
    """Bytes would be 255 times too large, and their PSNR meaningless."""
    pixels = torch.rand(1, 3, 16, 16)
    for wrong in ((pixels * 255).byte(), pixels.numpy(), None, "x", pixels.tolist()):
        for metric in (psnr, ssim):
            with pytest.raises(QLIPError, match="pixels are float tensors"):
                metric(wrong, pixels)  # type: ignore[arg-type]
