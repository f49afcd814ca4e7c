"""Image metrics, one value a picture, on pixels in [0, 1]."""

from __future__ import annotations

from torch import Tensor

from qlip.errors import QLIPError, require


def psnr(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, data range 1.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1].

    Returns:
        (B,) float64 in dB; infinite where the two are equal.
    """
    _check(rebuilt, originals)
    return -10 * (rebuilt.double() - originals.double()).square().mean((1, 2, 3)).log10()


def ssim(rebuilt: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al., 2004), mean over RGB channels.

    Gaussian window of 11 pixels, sigma 1.5, data range 1, K1 0.01, K2 0.03, at every pixel with the picture mirrored
    beyond its edges, as torchmetrics computes it; scikit-image leaves out the border where the window does not fit.

    Args:
        rebuilt, originals: (B, 3, H, W) in [0, 1], H and W at least 11.

    Returns:
        (B,) float32.
    """
    _check(rebuilt, originals)
    functional = require("torchmetrics.functional.image", extra="eval")
    result: Tensor = functional.structural_similarity_index_measure(
        rebuilt.float(), originals.float(), data_range=1.0, reduction="none"
    )
    return result.reshape(-1)


def _check(rebuilt: Tensor, originals: Tensor) -> None:
    if rebuilt.shape != originals.shape or rebuilt.dim() != 4:
        raise QLIPError(
            f"pictures {tuple(originals.shape)} and reconstructions {tuple(rebuilt.shape)} are no pairs (B, 3, H, W)"
        )
