"""Pixel losses."""

from __future__ import annotations

from torch import Tensor


def pixel_mse(reconstructions: Tensor, pixel_values: Tensor) -> Tensor:
    """L_mse: mean squared error over all pixels, in the processor's normalised space.

    Args:
        reconstructions: (B, 3, H, W) floating, unclamped.
        pixel_values: (B, 3, H, W) floating.

    Returns:
        Scalar float32.
    """
    return (reconstructions.float() - pixel_values.float()).square().mean()
