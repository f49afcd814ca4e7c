"""Image metrics, one value per image, on RGB pixels in [0, 1].

Shapes: B images of H x W pixels. A dataset's metric is the mean over its images, never the metric of a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.runtime.finite import require_finite

WINDOW, SIGMA = 11, 1.5
"""Size and deviation in pixels of SSIM's Gaussian window (Wang et al., 2004, section III.C)."""
C1, C2 = 0.01**2, 0.03**2
"""(K1 L)^2 and (K2 L)^2 with the data range L = 1."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM, finest scale first (Wang, Simoncelli and Bovik, 2003, section 3.2)."""
SMALLEST_MS_SSIM = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)
"""176 pixels: the window still fits into the coarsest of five scales."""
_PIECE = 2**16
"""Pixels worked on at once: what a processor's cache holds several maps of."""


def psnr(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, data range 1, one mean over all pixels and channels.

    scikit-image's ``peak_signal_noise_ratio(data_range=1)`` gives the same.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) float64 in dB; infinite where the two are equal.
    """
    _check(rebuilt, originals)
    return -10 * (_double(rebuilt) - _double(originals)).square().mean((1, 2, 3)).log10()


def round_to_8_bit(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1], any float type and shape, to the float32 numbers k / 255 of an 8-bit file."""
    return (pixels.float() * 255).round() / 255


def image_psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit RGB images, in dB; infinite if they are equal."""
    one, other = (torch.from_numpy(np.array(image)).movedim(-1, 0)[None].double() / 255 for image in (first, second))
    return float(psnr(other, one))


def _double(pixels: Tensor) -> Tensor:
    """float64, on the CPU where a device has none."""
    return (pixels.cpu() if pixels.device.type == "mps" else pixels).double()


def l1(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Mean absolute difference of each image over all pixels and channels.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) float32 in [0, 1].
    """
    _check(rebuilt, originals)
    return (rebuilt.float() - originals.float()).abs().mean((1, 2, 3))


def ssim(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004, eq. 13), mean over pixels and RGB channels.

    Gaussian window of 11 pixels, sigma 1.5, data range 1, K1 0.01, K2 0.03, at every pixel with the image mirrored
    beyond its edges, as torchmetrics computes it (equal to 1e-5); scikit-image (``gaussian_weights=True``,
    ``use_sample_covariance=False``) leaves out the border of 5 pixels where the window does not fit, and is equal
    inside it. The authors compared luminance; this compares R, G and B.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1], H and W at least 11.

    Returns:
        (B,) float32.

    Raises:
        QLIPError: no pairs, or they are smaller than the window.
    """
    _check(rebuilt, originals, WINDOW, "SSIM")
    return _pieces(lambda a, b: _similarity(a, b)[0].mean((1, 2, 3)), rebuilt, originals)


def ms_ssim(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image (Wang, Simoncelli and Bovik, 2003, eq. 7), over RGB.

    Five scales, each half the one before by means of 2 x 2 pixels. The product over scales of mean contrast-structure,
    at the coarsest of mean SSIM, to the powers 0.0448, 0.2856, 0.3001, 0.2363, 0.1333; negative means count as 0. The
    window is that of :func:`ssim`. Means run over channels, before the powers, and over the pixels where the window
    fits, but over all at the coarsest scale, as torchmetrics computes it (equal to 1e-5); TensorFlow and
    ``pytorch_msssim`` take the power of each channel and only pixels where the window fits.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1], H and W at least 176: fewer scales would be another metric.

    Returns:
        (B,) float32.

    Raises:
        QLIPError: no pairs, or they are too small for five scales.
    """
    _check(rebuilt, originals, SMALLEST_MS_SSIM, "MS-SSIM's five scales")
    return _pieces(_scales, rebuilt, originals)


def _scales(first: Tensor, second: Tensor) -> Tensor:
    """(n, 3, H, W) twice to MS-SSIM (n,)."""
    product, border = first.new_ones(len(first)), WINDOW // 2
    for number, weight in enumerate(SCALE_WEIGHTS):
        if number:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
        whole, contrast = _similarity(first, second)
        inside = contrast[..., border:-border, border:-border]
        last = number == len(SCALE_WEIGHTS) - 1
        product = product * (whole if last else inside).mean((1, 2, 3)).clamp_min(0) ** weight
    return product


def _similarity(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3, H, W) float32 twice to maps (n, 3, H, W) of SSIM and of its contrast-structure factor.

    Four maps are blurred instead of five: only the sum of both variances is needed.
    """
    first, second = (F.pad(one, (WINDOW // 2,) * 4, mode="reflect") for one in (first, second))
    maps = torch.stack((first, second, first * first + second * second, first * second))
    mean_1, mean_2, squares, products = blurred(maps, gaussian(WINDOW // 2, SIGMA))
    product, powers = mean_1 * mean_2, mean_1 * mean_1 + mean_2 * mean_2
    contrast = (2 * (products - product) + C2) / ((squares - powers).clamp_min_(0) + C2)
    return (2 * product + C1) / (powers + C1) * contrast, contrast


def gaussian(radius: int, sigma: float) -> list[float]:
    """The weights of a Gaussian at -radius to radius, sum 1."""
    weights = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def blurred(maps: Tensor, window: list[float]) -> Tensor:
    """Maps under a symmetric window along both axes, where it fits.

    Sums of shifted maps: eight times as fast on a CPU as a convolution, in full float32 on any device, and an image's
    numbers do not depend on its batch.

    Args:
        maps: (..., H, W) float32.
        window: 2 r + 1 weights, the same forth and back.

    Returns:
        (..., H - 2 r, W - 2 r).
    """
    radius = len(window) // 2
    for axis in (-2, -1):
        length = maps.shape[axis] - 2 * radius
        total = maps.narrow(axis, radius, length) * window[radius]
        for offset in range(radius):
            for start in (offset, 2 * radius - offset):
                total.add_(maps.narrow(axis, start, length), alpha=window[offset])
        maps = total
    return maps


def _pieces(measure: Callable[[Tensor, Tensor], Tensor], rebuilt: Tensor, originals: Tensor) -> Tensor:
    """A metric of many images, a few at a time."""
    found = [measure(first.float(), second.float()) for first, second in split(rebuilt, originals)]
    return torch.cat(found) if found else rebuilt.new_empty(0, dtype=torch.float32)


def split(rebuilt: Tensor, originals: Tensor, pixels: int = _PIECE) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of at most so many pixels an image set, one image at least."""
    several = max(1, pixels // rebuilt.shape[2:].numel())
    if len(rebuilt):
        yield from zip(rebuilt.split(several), originals.split(several), strict=True)


def _check(rebuilt: Tensor, originals: Tensor, smallest: int = 1, what: str = "") -> None:
    for pixels in (rebuilt, originals):
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise QLIPError(f"pixels are float tensors in [0, 1], not {kind}; torch.as_tensor(pixels) / 255 makes one")
    if rebuilt.shape != originals.shape or rebuilt.dim() != 4:
        raise QLIPError(
            f"images {tuple(originals.shape)} and reconstructions {tuple(rebuilt.shape)} are no pairs (B, 3, H, W)"
        )
    height, width = rebuilt.shape[2:]
    if min(height, width) < smallest:
        raise QLIPError(f"{width}x{height} pixels are too few for {what}: {smallest} a side at least; leave it out")
    for pixels in (rebuilt, originals):
        require_finite(pixels, "pixels", "the model that made them is broken")
