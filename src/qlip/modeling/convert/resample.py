"""Resampling of patch and position embeddings to another patch size or grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.modeling.vision import interpolate_positions


def resample_patches(weight: Tensor, patch_size: int) -> Tensor:
    """Resample a patch embedding to another patch size by the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013).

    With B the matrix that resizes a patch bicubically, the new weights are those whose outputs for resized patches are
    nearest to the old outputs for the patches: (B^T)^+ w. For larger patches the outputs are equal. For smaller ones,
    where B blurs before it samples, the output for a flat patch is kept exact as well (our addition): most of an
    image's energy is in its flat part.

    Args:
        weight: (D, C, p, p), the convolution's.
        patch_size: the new p.

    Returns:
        (D, C, patch_size, patch_size) float32; ``weight`` itself if the size is equal.
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight
    smaller = patch_size < old
    basis = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    size = (patch_size, patch_size)
    resized = F.interpolate(basis, size=size, mode="bicubic", align_corners=False, antialias=smaller)
    matrix = resized.flatten(1).t()  # (new^2, old^2), B
    flat = weight.double().flatten(2)
    new = flat @ torch.linalg.pinv(matrix)
    if smaller:
        direction = torch.linalg.solve(matrix @ matrix.t(), torch.ones(patch_size**2, dtype=torch.float64))
        missing = flat.sum(-1, keepdim=True) - new.sum(-1, keepdim=True)
        new = new + missing * direction / direction.sum()
    result: Tensor = new.unflatten(-1, size).float()
    return result


def resample_positions(table: Tensor, grid: int) -> Tensor:
    """Resample position embeddings of [CLS] and a square grid to another square grid: bicubic, [CLS] unchanged.

    Args:
        table: (1 + g * g, D).
        grid: patches per side.

    Returns:
        (1 + grid * grid, D); ``table`` itself if the grid is equal.

    Raises:
        QLIPError: the table is not [CLS] and a square grid.
    """
    old = grid_of(table)
    if old == grid:
        return table
    patches = interpolate_positions(table[None, 1:], (old, old), (grid, grid))
    return torch.cat((table[:1], patches[0]))


def grid_of(table: Tensor) -> int:
    """Patches per side of the grid of (1 + g * g, D) position embeddings. Raises QLIPError if it is not square."""
    side = math.isqrt(max(0, table.shape[0] - 1))
    if not side or 1 + side * side != table.shape[0]:
        raise QLIPError(f"{table.shape[0]} position embeddings are not [CLS] and a square grid of patches")
    return side
