"""Images of other sizes and shapes than the trained one, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.modeling.vision import interpolate_positions
from tests import literal
from tests.modeling.helpers import assert_close, assert_grad_close, small_config

GRIDS = [(4, 4), (2, 7), (7, 2), (1, 1), (1, 9), (8, 8), (5, 3)]


def _model(**changes: Any) -> QLIPModel:
    torch.manual_seed(0)
    model = QLIPModel(QLIPConfig.from_dict(small_config(**changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.12)
    return model


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rope", [True, False])
def test_model__image_of_another_shape(grid: tuple[int, int], rope: bool) -> None:
    model = _model(grid__rope=rope)
    rows, columns = grid
    pixels = torch.randn(2, 3, rows * 4, columns * 4)
    with torch.no_grad():
        output = model(pixels)
        indices = model.encode(pixels)
        decoded = model.decode(indices, grid=grid)
    assert model.grid_of(pixels) == grid
    assert indices.shape == (2, rows * columns, model.num_groups)
    assert output.reconstructions.shape == decoded.shape == pixels.shape
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(decoded, output.reconstructions, rtol=1e-5, atol=1e-5)
    assert model.get_patch_features(pixels).shape == (2, rows * columns, 32)
    assert torch.isfinite(model.get_image_features(pixels)).all()


@pytest.mark.parametrize("grid", [(2, 7), (5, 3)])
def test_model__equals_the_twin_with_interpolated_positions(grid: tuple[int, int]) -> None:
    """Positions resampled bicubically by hand, rotary coordinates scaled per axis as the literal tables are."""
    config = small_config()
    model = _model().train()
    pixels = torch.randn(2, 3, grid[0] * 4, grid[1] * 4)
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}

    def resampled(table: torch.Tensor) -> torch.Tensor:
        image = table.T.reshape(1, -1, 4, 4)
        return F.interpolate(image, size=grid, mode="bicubic", align_corners=False).flatten(2)[0].T

    positions = state["vision_model.embeddings.position_embedding.weight"]
    moved = dict(state)
    moved["vision_model.embeddings.position_embedding.weight"] = torch.cat([positions[:1], resampled(positions[1:])])
    moved["vision_decoder.position_embeddings"] = resampled(state["vision_decoder.position_embeddings"][0])[None]
    expected = literal.literal_forward(moved, config, pixels, train=True)
    output = model(pixels)
    assert torch.equal(output.indices, expected["group_indices"])
    assert_close("reconstructions", output.reconstructions.detach(), expected["reconstructions"].detach())
    assert_close("pooled", output.vision_model_output.pooler_output.detach(), expected["vision.pooler_output"])
    (F.mse_loss(output.reconstructions, pixels) + output.quantizer_loss).backward()
    expected["train.total_loss"].backward()
    for name, parameter in model.named_parameters():
        if state[name].grad is not None:
            assert_grad_close(name, parameter.grad, state[name].grad)


def test_decode__explicit_trained_grid_is_bit_identical() -> None:
    model = _model()
    pixels = torch.randn(2, 3, 16, 16)
    indices = model.encode(pixels)
    assert torch.equal(model.decode(indices), model.decode(indices, grid=(4, 4)))
    table = torch.randn(1, 16, 8)
    assert interpolate_positions(table, (4, 4), (4, 4)) is table


def test_model__another_size_in_between_leaves_no_trace() -> None:
    model = _model()
    pixels = torch.randn(1, 3, 16, 16)
    before = model(pixels).reconstructions
    model(torch.randn(1, 3, 8, 24))
    assert torch.equal(model(pixels).reconstructions, before)


class TestInterpolation:
    """Properties that any sensible resampling of positions has."""

    def test_a_constant_stays_constant(self) -> None:
        table = torch.full((1, 16, 3), 0.7)
        for grid in GRIDS:
            result = interpolate_positions(table, (4, 4), grid)
            assert result.shape == (1, grid[0] * grid[1], 3)
            torch.testing.assert_close(result, torch.full_like(result, 0.7))

    def test_rows_and_columns_are_not_mixed(self) -> None:
        rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
        result = interpolate_positions(rows, (4, 4), (6, 9)).reshape(6, 9)
        torch.testing.assert_close(result, result[:, :1].expand(6, 9))
        assert (result[1:, 0] > result[:-1, 0]).all()

    def test_turning_the_grid_turns_the_result(self) -> None:
        table = torch.randn(4, 4, 5)
        wide = interpolate_positions(table.reshape(1, 16, 5), (4, 4), (3, 7)).reshape(3, 7, 5)
        turned = table.transpose(0, 1).reshape(1, 16, 5)
        tall = interpolate_positions(turned, (4, 4), (7, 3)).reshape(7, 3, 5)
        torch.testing.assert_close(wide.transpose(0, 1), tall)

    def test_the_dtype_stays(self) -> None:
        table = torch.randn(1, 16, 5, dtype=torch.bfloat16)
        assert interpolate_positions(table, (4, 4), (6, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 16, 18), (2, 3, 0, 16), (2, 1, 16, 16), (3, 16, 16)])
def test_model__pixels_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = _model()
    for call in (model, model.encode, model.get_image_features, model.get_patch_features):
        with pytest.raises(QLIPError, match=r"multiple of the patch|must be \(B, 3, H, W\)"):
            call(torch.zeros(shape))


def test_decode__grid_is_required_if_not_square_and_checked() -> None:
    model = _model()
    indices = torch.zeros(1, 14, 3, dtype=torch.int64)
    with pytest.raises(QLIPError, match=r"14 tokens.*grid=\(rows, columns\)"):
        model.decode(indices)
    for grid in ((4, 4), (14, 2), (0, 14), (-2, -7), (2, 7, 1)):
        with pytest.raises(QLIPError, match=r"14"):
            model.decode(indices, grid=grid)  # type: ignore[arg-type]
    assert model.decode(indices, grid=(2, 7)).shape == (1, 3, 8, 28)
    assert not torch.equal(model.decode(indices, grid=(1, 14)).flatten(), model.decode(indices, grid=(14, 1)).flatten())


@pytest.mark.parametrize("bad", [-1, 16, 1 << 40])
def test_decode__index_out_of_range_is_refused(bad: int) -> None:
    indices = torch.zeros(1, 16, 3, dtype=torch.int64)
    indices[0, 5, 1] = bad
    with pytest.raises(QLIPError, match=rf"index {bad} is out of range.*4 bits"):
        _model().decode(indices)


@pytest.mark.parametrize(
    "indices",
    [
        torch.zeros(1, 16, 4, dtype=torch.int64),
        torch.zeros(16, 3, dtype=torch.int64),
        torch.zeros(1, 16, 3),
        torch.zeros(1, 16, 3, dtype=torch.int32),
        torch.zeros(1, 0, 3, dtype=torch.int64),
    ],
    ids=["groups", "no batch", "float", "int32", "no tokens"],
)
def test_decode__indices_of_the_wrong_type_are_refused(indices: torch.Tensor) -> None:
    with pytest.raises(QLIPError):
        _model().decode(indices)


def test_model__invalid_texts_are_refused() -> None:
    model = _model()
    with pytest.raises(QLIPError, match=r"11 positions.*at most 10"):
        model(input_ids=torch.zeros(1, 11, dtype=torch.int64))
    with pytest.raises(QLIPError, match=r"\(B, N\)"):
        model(input_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(QLIPError, match=r"nothing to do"):
        model()
    ids, pixels = torch.zeros(3, 10, dtype=torch.int64), torch.zeros(2, 3, 16, 16)
    with pytest.raises(QLIPError, match=r"equal number"):
        model(pixels, ids, return_loss=True)
    with pytest.raises(QLIPError, match=r"equal number"):
        model(pixels, return_loss=True)


@pytest.mark.parametrize("layer", [-4, 3, 10])
def test_get_patch_features__unknown_layer_is_refused(layer: int) -> None:
    with pytest.raises(QLIPError, match=rf"layer {layer} does not exist"):
        _model().get_patch_features(torch.zeros(1, 3, 16, 16), layer=layer)
