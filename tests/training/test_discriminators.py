"""Both discriminators: any size, no image that depends on the cut of a batch, the paper's deviation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.training.losses.adversarial import gradient_penalty
from qlip.training.tasks.discriminators import (
    PatchDiscriminator,
    ResidualDiscriminator,
    build_discriminator,
    with_deviation,
)
from qlip.training.tasks.recipe_schema import DiscriminatorSection


def settings(**values: Any) -> DiscriminatorSection:
    return DiscriminatorSection(**({"channels": 16} | values))


@pytest.mark.parametrize(
    ("values", "size", "logits"),
    [
        ({}, (24, 24), (1, 1)),
        ({}, (32, 32), (2, 2)),
        ({}, (64, 96), (6, 10)),
        ({"layers": 1}, (16, 16), (6, 6)),
        ({"layers": 4}, (256, 256), (14, 14)),
        ({"kind": "stylegan"}, (8, 8), (1, 1)),
        ({"kind": "stylegan"}, (32, 32), (1, 1)),
        ({"kind": "stylegan"}, (64, 64), (1, 1)),
        ({"kind": "stylegan"}, (98, 56), (1, 1)),
    ],
)
def test_sizes_and_gradients(values: dict[str, Any], size: tuple[int, int], logits: tuple[int, int]) -> None:
    network = build_discriminator(settings(**values), size, seed=0)
    images = torch.randn(2, 3, *size, requires_grad=True)
    found = network(images)
    assert found.shape == (2, 1, *logits)
    (found.sum() + gradient_penalty(found, images).sum()).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert not list(network.buffers()), "no state that a forward pass could move"


def test_sizes_of_the_published_kind() -> None:
    def count(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    # 64, 128, 256, 512 channels of 4 x 4 kernels; norms have a gain and a bias, and take the place of biases
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert count(PatchDiscriminator(64, 3)) == kernels + 64 + 2 * (128 + 256 + 512) + 1 == 2_765_633
    assert 10e6 < count(ResidualDiscriminator(64, (256, 256))) < 30e6


@pytest.mark.parametrize(("kind", "cut"), [("patchgan", 1), ("patchgan", 3), ("stylegan", 4)])
def test_a_batch_may_be_cut(kind: str, cut: int) -> None:
    network = build_discriminator(settings(kind=kind), (32, 32), seed=0)
    images = torch.randn(10, 3, 32, 32)
    pieces = torch.cat([network(piece) for piece in images.split(cut)])
    torch.testing.assert_close(network(images), pieces, rtol=1e-5, atol=1e-6)


def test_deviation_against_a_literal_loop() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 3, 3)
    found = with_deviation(x, group=4)
    assert torch.equal(found[:, :2], x)
    for first, last in ((0, 4), (4, 6)):
        group = x[first:last]
        deviations = []
        for values in group.flatten(1).t():
            mean = sum(values.tolist()) / len(values)
            deviations.append((sum((value - mean) ** 2 for value in values.tolist()) / len(values) + 1e-8) ** 0.5)
        expected = torch.full((last - first, 3, 3), sum(deviations) / len(deviations))
        torch.testing.assert_close(found[first:last, 2], expected, rtol=1e-4, atol=1e-6)


def test_discriminator__single_image_has_a_gradient() -> None:
    x = torch.ones(1, 2, 3, 3, requires_grad=True)
    with_deviation(x)[:, 2].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


def test_one_seed_gives_one_network_and_moves_no_random_numbers() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in build_discriminator(settings(), (32, 32), seed).parameters()])

    torch.manual_seed(5)
    first = weights(1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(weights(1), first) and not torch.equal(weights(2), first)


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ({}, (20, 64), "discriminator.layers: 3 leave nothing of 20 x 64 pixels, they take 24 or more; lower it"),
        ({"kind": "stylegan"}, (7, 7), "discriminator.kind=stylegan takes images of 8 x 8 pixels or more"),
    ],
)
def test_discriminator__too_small_images_are_refused(
    values: dict[str, Any], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(QLIPError, match=message):
        build_discriminator(settings(**values), size, seed=0)
