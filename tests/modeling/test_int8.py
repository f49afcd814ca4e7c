"""Encoding with 8-bit weights: nearly the same tokens, the same model by its fingerprints, nothing else touched."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.modeling.indices import indices_to_bits
from qlip.modeling.int8 import Int8Linear, Rounding, to_int8


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    processor = QLIPProcessor.from_pretrained("bundled")
    return torch.stack(
        [
            processor.pixels(path)
            for path in sorted(assets.path("images").rglob("*.*"))
            if path.suffix in (".jpg", ".png")
        ]
    )


def changed_bits(model: QLIPModel, other: QLIPModel, pixels: Tensor) -> float:
    """Share of the tokens' bits."""
    first, second = (indices_to_bits(one.encode(pixels), one.group_size) for one in (model, other))
    return float((first != second).float().mean())


def test_int8_linear__equals_float_up_to_rounding() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(5, 7, 64) * torch.logspace(-2, 2, 7)[:, None]  # tokens of very different size
    exact, rounded = linear(x), Int8Linear(linear, Rounding())(x)
    size = (exact - linear.bias).norm(dim=-1)
    assert ((rounded - exact).norm(dim=-1) / size).max() < 0.02  # of each token, small ones too


def test_int8_linear__zeros_give_the_bias() -> None:
    linear = nn.Linear(8, 4)
    torch.testing.assert_close(Int8Linear(linear, Rounding())(torch.zeros(2, 8)), linear.bias.expand(2, 4))


@torch.no_grad()
def test_to_int8__bundled_model_keeps_98_percent_of_bits_and_its_fingerprint(pixels: Tensor) -> None:
    exact = QLIPModel.from_pretrained("bundled")
    fast = to_int8(QLIPModel.from_pretrained("bundled"))
    assert 0 < changed_bits(exact, fast, pixels) < 0.02
    assert fast.code_fingerprint == exact.code_fingerprint
    assert fast.decoder_fingerprint == exact.decoder_fingerprint
    tokens = exact.encode(pixels)
    assert torch.equal(fast.decode(tokens), exact.decode(tokens))
    similar = (exact(pixels).image_embeds * fast(pixels).image_embeds).sum(-1)
    assert similar.min() > 0.99


def test_rounding__once_per_input_and_then_released() -> None:
    rounding, x = Rounding(readers=2), torch.randn(3, 4)
    first = rounding(x)
    assert rounding(x) is first and rounding(x) is not first
    other = rounding(x + 1)  # a pass that was broken off leaves nothing behind for the next
    assert not torch.equal(other[1], first[1])
    held = weakref.ref(x)
    rounding(torch.zeros(1, 4))
    rounding(torch.ones(1, 4))
    del x
    assert held() is None


def test_to_int8__only_float32_on_a_cpu() -> None:
    with pytest.raises(QLIPError, match="float32 weights on a CPU, not bfloat16"):
        to_int8(QLIPModel.from_pretrained("bundled", dtype=torch.bfloat16))
