"""FID's network: shapes and names of the published file, its resize, and a literal twin of its graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qlip import QLIPError
from qlip.evaluation.networks import Inception
from qlip.evaluation.networks.inception import resize_like_tensorflow


@pytest.fixture(scope="module")
def network() -> Inception:
    """Of random weights and random statistics of normalisation."""
    torch.manual_seed(0)
    made = Inception()
    for name, tensor in made.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif "bn" in name and tensor.is_floating_point():
            tensor.uniform_(-0.2, 0.2).add_(float(name.endswith("weight")))
    return made


def test_inception__has_the_published_numbers(network: Inception) -> None:
    # Inception v3 in torchvision: 23,834,568 parameters without the second classifier, 2,049,000 of them the first one
    assert sum(one.numel() for one in network.parameters()) == 23_834_568 - 2_049_000
    shapes = {name: tuple(one.shape) for name, one in network.state_dict().items()}
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_3.bn.running_var": (192,),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.bn.bias": (320,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert len(shapes) == 94 * 6 and network.dimensions == 2048


# a literal twin: functions of the state, branch by branch, pools taken by hand


def pooled(x: Tensor) -> Tensor:
    """Each place's mean of the up to nine that exist, by adding shifted images."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    around, ones = F.pad(x, (1, 1, 1, 1)), F.pad(torch.ones_like(x), (1, 1, 1, 1))
    height, width = x.shape[2:]
    for row in range(3):
        for column in range(3):
            total += around[:, :, row : row + height, column : column + width]
            count += ones[:, :, row : row + height, column : column + width]
    return total / count


def twin(state: dict[str, Tensor], x: Tensor) -> Tensor:
    def layer(name: str, x: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
        y = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        mean, var, weight, bias = (
            state[f"{name}.bn.{one}"].view(-1, 1, 1) for one in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (var + 0.001).sqrt() * weight + bias).clamp_min(0)

    def a(name: str, x: Tensor) -> Tensor:
        five = layer(f"{name}.branch5x5_2", layer(f"{name}.branch5x5_1", x), 1, (2, 2))
        three = layer(f"{name}.branch3x3dbl_2", layer(f"{name}.branch3x3dbl_1", x), 1, (1, 1))
        three = layer(f"{name}.branch3x3dbl_3", three, 1, (1, 1))
        return torch.cat([layer(f"{name}.branch1x1", x), five, three, layer(f"{name}.branch_pool", pooled(x))], 1)

    def c(name: str, x: Tensor) -> Tensor:
        seven = layer(f"{name}.branch7x7_2", layer(f"{name}.branch7x7_1", x), 1, (0, 3))
        seven = layer(f"{name}.branch7x7_3", seven, 1, (3, 0))
        twice = layer(f"{name}.branch7x7dbl_1", x)
        for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            twice = layer(f"{name}.branch7x7dbl_{number}", twice, 1, padding)
        return torch.cat([layer(f"{name}.branch1x1", x), seven, twice, layer(f"{name}.branch_pool", pooled(x))], 1)

    def e(name: str, x: Tensor, pool: Tensor) -> Tensor:
        three = layer(f"{name}.branch3x3_1", x)
        sides = [layer(f"{name}.branch3x3_2a", three, 1, (0, 1)), layer(f"{name}.branch3x3_2b", three, 1, (1, 0))]
        twice = layer(f"{name}.branch3x3dbl_2", layer(f"{name}.branch3x3dbl_1", x), 1, (1, 1))
        sides.append(layer(f"{name}.branch3x3dbl_3a", twice, 1, (0, 1)))
        sides.append(layer(f"{name}.branch3x3dbl_3b", twice, 1, (1, 0)))
        return torch.cat([layer(f"{name}.branch1x1", x), *sides, layer(f"{name}.branch_pool", pool)], 1)

    x = layer("Conv2d_2a_3x3", layer("Conv2d_1a_3x3", x, 2))
    x = F.max_pool2d(layer("Conv2d_2b_3x3", x, 1, (1, 1)), 3, 2)
    x = F.max_pool2d(layer("Conv2d_4a_3x3", layer("Conv2d_3b_1x1", x)), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(name, x)
    three = layer("Mixed_6a.branch3x3dbl_2", layer("Mixed_6a.branch3x3dbl_1", x), 1, (1, 1))
    three = layer("Mixed_6a.branch3x3dbl_3", three, 2)
    x = torch.cat([layer("Mixed_6a.branch3x3", x, 2), three, F.max_pool2d(x, 3, 2)], 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(name, x)
    seven = layer("Mixed_7a.branch7x7x3_2", layer("Mixed_7a.branch7x7x3_1", x), 1, (0, 3))
    seven = layer("Mixed_7a.branch7x7x3_4", layer("Mixed_7a.branch7x7x3_3", seven, 1, (3, 0)), 2)
    three = layer("Mixed_7a.branch3x3_2", layer("Mixed_7a.branch3x3_1", x), 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    x = e("Mixed_7b", x, pooled(x))
    x = e("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))


@torch.no_grad()
def test_inception__features_against_a_literal_twin(network: Inception) -> None:
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    features = network.features(images)
    expected = twin(network.state_dict(), (255 * images - 128) / 128)
    assert features.shape == (1, 2048) and float(expected.std()) > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_inception__tensorflows_resize_place_by_place() -> None:
    image = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    resized = resize_like_tensorflow(image, 9)
    for row in range(9):
        for column in range(9):
            y, x = row * 5 / 9, column * 7 / 9
            top, left = int(y), int(x)
            down, right = min(top + 1, 4), min(left + 1, 6)
            upper = image[0, :, top, left] * (1 - x + left) + image[0, :, top, right] * (x - left)
            lower = image[0, :, down, left] * (1 - x + left) + image[0, :, down, right] * (x - left)
            expected = upper * (1 - y + top) + lower * (y - top)
            torch.testing.assert_close(resized[0, :, row, column], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(resize_like_tensorflow(image, 5)[..., :1], image[..., :1])
    # what the documentation of the resize shows: 2 pixels to 4, the last one repeated
    pair = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_like_tensorflow(pair, 4)[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.0]


class Enough(Exception):
    """The first layer was reached."""


def test_inception__the_three_conventions_are_told_apart(network: Inception) -> None:
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))

    def first_input(network: Inception) -> Tensor:
        def reached(module: torch.nn.Module, given: tuple[Tensor]) -> None:
            raise Enough(given[0])

        hook = network.Conv2d_1a_3x3.register_forward_pre_hook(reached)
        with pytest.raises(Enough) as caught:
            network.features(images)
        hook.remove()
        found: Tensor = caught.value.args[0]
        return found

    torch.testing.assert_close(first_input(network), (resize_like_tensorflow(255 * images, 299) - 128) / 128)
    other = Inception("pytorch-fid")
    assert (network.suffix, other.suffix, other.short) == ("", "_pytorch_fid", "inception_pytorch_fid")
    torch.testing.assert_close(first_input(other), F.interpolate(2 * images - 1, (299, 299), mode="bilinear"))
    assert "tensorflow" in str(network.described()["input"]) and "pytorch-fid" in str(other.described()["input"])
    clean = Inception("clean-fid")
    assert (clean.suffix, clean.short) == ("_clean_fid", "inception_clean_fid")
    assert "bicubic with antialias, both sides, as clean-fid" in str(clean.described()["input"])
    for side in (40, 320):  # clean-fid resizes each channel as floats by Pillow
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
        channels = [
            Image.fromarray((255 * one).numpy()).resize((299, 299), Image.Resampling.BICUBIC) for one in images[0]
        ]
        expected = (torch.stack([torch.from_numpy(np.array(one)) for one in channels])[None].clamp(0, 255) - 128) / 128
        torch.testing.assert_close(first_input(clean), expected, rtol=0, atol=1e-4)
    with pytest.raises(QLIPError, match="Inception's input is tensorflow, pytorch-fid, clean-fid, got 'clean'"):
        Inception("clean")  # type: ignore[arg-type]
