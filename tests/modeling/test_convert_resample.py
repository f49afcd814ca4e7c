"""Patch and position embeddings of another size: properties that any good resampling has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qlip import QLIPError
from qlip.modeling.convert.resample import grid_of, resample_patches, resample_positions
from tests.modeling.helpers import assert_close


@pytest.mark.parametrize("size", [6, 8, 10, 14, 16, 28])
def test_resample_patches__flat_patch_keeps_its_output(size: int) -> None:
    weight = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(size))
    colour = torch.randn(3, 1, 1)
    before = (weight * colour).sum((1, 2, 3))
    assert_close("flat patch", (resample_patches(weight, size) * colour).sum((1, 2, 3)), before)


def test_resample__equal_size_is_unchanged() -> None:
    weight = torch.randn(2, 3, 8, 8)
    assert resample_patches(weight, 8) is weight


@pytest.mark.parametrize("size", [15, 16, 21, 28])
def test_resample_patches__larger_patches_are_exact(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, patches = torch.randn(5, 3, 14, 14, generator=generator), torch.randn(9, 3, 14, 14, generator=generator)
    larger = F.interpolate(patches, size=(size, size), mode="bicubic", align_corners=False)
    before = patches.flatten(1) @ weight.flatten(1).t()
    assert_close("answers", larger.flatten(1) @ resample_patches(weight, size).flatten(1).t(), before)


@pytest.mark.parametrize("size", [8, 10, 12])
def test_resample_patches__smaller_patches_beat_resized_weights(size: int) -> None:
    """On smooth patches, which is what images are made of."""
    generator = torch.Generator().manual_seed(1)
    smooth = F.interpolate(torch.randn(64, 3, 4, 4, generator=generator), size=(14, 14), mode="bicubic")
    weight = F.interpolate(torch.randn(5, 3, 6, 6, generator=generator), size=(14, 14), mode="bicubic")
    before = smooth.flatten(1) @ weight.flatten(1).t()
    small = F.interpolate(smooth, size=(size, size), mode="bicubic", align_corners=False, antialias=True).flatten(1)

    def error(weights: torch.Tensor) -> float:
        return (small @ weights.flatten(1).t() - before).pow(2).mean().sqrt().item()

    resized = F.interpolate(weight, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    scaled = resized * (14 / size) ** 2
    assert error(resample_patches(weight, size)) < min(error(resized), error(scaled))
    assert error(resample_patches(weight, size)) < 0.25 * before.pow(2).mean().sqrt().item()


def test_resample_positions__keeps_cls_and_smooth_fields() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    field = torch.stack((torch.ones(256), rows.flatten(), (rows * columns).flatten()), -1)
    table = torch.cat((torch.tensor([[7.0, 8.0, 9.0]]), field))
    assert resample_positions(table, 16) is table
    for grid in (8, 14, 28):
        resampled = resample_positions(table, grid)
        assert resampled.shape == (1 + grid * grid, 3) and torch.equal(resampled[0], table[0])
        assert_close("constant", resampled[1:, 0], torch.ones(grid * grid))
        # cell centres: the field's value at the centre of every new cell, but for the borders' replicated samples
        centres = ((torch.arange(grid) + 0.5) / grid * 16 - 0.5) / 15 * 2 - 1
        inner = slice(grid // 7 + 1, grid - grid // 7 - 1)
        wanted = centres[:, None].expand(grid, grid)[inner, inner]
        assert_close("ramp", resampled[1:, 1].view(grid, grid)[inner, inner], wanted, extra=1e-2)


@pytest.mark.parametrize("count", [0, 1, 3, 16, 258])
def test_grid_of__other_counts_are_refused(count: int) -> None:
    with pytest.raises(QLIPError, match="position embeddings are not"):
        grid_of(torch.zeros(count, 4))
