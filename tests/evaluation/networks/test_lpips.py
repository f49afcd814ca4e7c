"""LPIPS against stored distances, against others' figures for these weights, and against a slow literal twin."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.networks.lpips import LPIPS, Net

from ...weights import lpips_weights

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def networks() -> dict[Net, LPIPS]:
    lpips_weights()
    return {"vgg": LPIPS.from_cache("vgg"), "alex": LPIPS.from_cache("alex")}


def pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def noise(seed: int, size: int = 256) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(0.05 * rng.normal(size=(1, size, size, 3))).permute(0, 3, 1, 2).float()


# astronaut, 512 px, by Pillow's Lanczos to 256: itself, JPEG-90, JPEG-10, noise of sigma 0.05 on [-1, 1] (seeds 0, 1);
# computed on 2026-11-24 by this code, after the checks below. JPEG's digits are Pillow 13's.
STORED: dict[Net, tuple[float, ...]] = {
    "vgg": (0.0, 0.0375, 0.3295, 0.1489, 0.1464),
    "alex": (0.0, 0.0051, 0.1546, 0.0471, 0.0481),
}


def test_lpips__the_distances_of_an_astronaut(networks: dict[Net, LPIPS]) -> None:
    image = Image.fromarray(skimage_data.astronaut()).resize((256, 256), Image.Resampling.LANCZOS)
    whole = pixels(image)
    others = [whole, pixels(jpeg(image, 90)), pixels(jpeg(image, 10)), whole + noise(0), whole + noise(1)]
    for net, network in networks.items():
        levels = network.levels(whole)
        distances = [float(network(other, levels)) for other in others]
        assert distances[0] == 0.0
        np.testing.assert_allclose(distances, STORED[net], rtol=0.01, atol=1e-4)


def test_lpips__distances_that_others_measured_with_these_weights(networks: dict[Net, LPIPS]) -> None:
    # reported of "a photo": JPEG-90 0.037, JPEG-10 0.464, another photo 0.725. Three fit 256 px of the upper left
    # corners of scikit-image's cat and coffee; the fourth, unknown noise of 0.05, was 0.141 and is 0.147 to 0.152 there
    cat, coffee = (Image.fromarray(np.ascontiguousarray(a[:256, :256])) for a in map(_of, ("cat", "coffee")))
    network, levels = networks["vgg"], networks["vgg"].levels(pixels(cat))
    found = [float(network(other, levels)) for other in map(pixels, (jpeg(cat, 90), jpeg(cat, 10), coffee))]
    np.testing.assert_allclose(found, (0.037, 0.464, 0.725), atol=1e-3)


def _of(name: str) -> np.ndarray:
    image: np.ndarray = getattr(skimage_data, name)()
    return image


# a literal twin: channels last, kernels as the package holds them, float64, each kernel tap a matrix product


def twin_convolution(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """(H, W, C) by (kh, kw, C, D), as JAX's correlation of the same name."""
    x = torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding))
    kh, kw = kernel.shape[:2]
    height, width = (x.shape[0] - kh) // stride + 1, (x.shape[1] - kw) // stride + 1
    out = bias.expand(height, width, -1)
    for row in range(kh):
        for column in range(kw):
            taken = x[row : row + stride * height : stride, column : column + stride * width : stride]
            out = out + taken @ kernel[row, column]
    return out


def twin_pool(x: Tensor, side: int) -> Tensor:
    height, width = (x.shape[0] - side) // 2 + 1, (x.shape[1] - side) // 2 + 1
    taps = [x[r : r + 2 * height : 2, c : c + 2 * width : 2][:height, :width] for r in range(side) for c in range(side)]
    return torch.stack(taps).amax(0)


def twin_levels(net: Net, state: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    shift, scale = image.new_tensor([-0.030, -0.088, -0.188]), image.new_tensor([0.458, 0.448, 0.450])
    x, found, number = (image.permute(1, 2, 0) - shift) / scale, [], 0

    def convolve(x: Tensor, stride: int, padding: int) -> Tensor:
        nonlocal number
        kernel = state[f"features.{number}.weight"].permute(2, 3, 1, 0)
        out = twin_convolution(x, kernel, state[f"features.{number}.bias"], stride, padding).clamp_min(0)
        number += 1
        return out

    if net == "alex":
        for stride, padding, pool in ((4, 2, 0), (1, 2, 3), (1, 1, 3), (1, 1, 0), (1, 1, 0)):
            x = convolve(twin_pool(x, pool) if pool else x, stride, padding)
            found.append(x)
        return found
    for block, count in enumerate((2, 2, 3, 3, 3)):
        x = twin_pool(x, 2) if block else x
        for _ in range(count):
            x = convolve(x, 1, 1)
        found.append(x)
    return found


def twin_distance(net: Net, state: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
    total = first.new_zeros(())
    for level, (own, other) in enumerate(
        zip(twin_levels(net, state, first), twin_levels(net, state, second), strict=True)
    ):
        own = own / ((own**2).sum(-1, keepdim=True).sqrt() + 1e-10)
        other = other / ((other**2).sum(-1, keepdim=True).sqrt() + 1e-10)
        total = total + ((own - other) ** 2 @ state[f"linear.{level}"]).mean()
    return total


@pytest.mark.parametrize(("net", "size"), [("vgg", (34, 33)), ("alex", (70, 51))])
def test_lpips__distance_and_gradient_against_a_literal_twin(
    networks: dict[Net, LPIPS], net: Net, size: tuple[int, int]
) -> None:
    network = networks[net]
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    height, width = size
    astronaut = Image.fromarray(skimage_data.astronaut())
    target = pixels(astronaut.crop((200, 100, 200 + width, 100 + height)))
    image = torch.cat([target + noise(3, 80)[..., :height, :width], target.flip(3)]).requires_grad_(True)
    distances = network(image, target.expand(2, -1, -1, -1))
    distances.sum().backward()
    doubled = image.detach().double().requires_grad_(True)
    expected = torch.stack([twin_distance(net, state, one, target[0].double()) for one in doubled])
    expected.sum().backward()
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-6)
    assert image.grad is not None and doubled.grad is not None
    torch.testing.assert_close(
        image.grad.double(), doubled.grad, rtol=1e-2, atol=1e-3 * float(doubled.grad.abs().max())
    )


# what training relies on


def random_network() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("vgg")


def test_lpips__weights_are_frozen_and_gradients_reach_images() -> None:
    network = random_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    holder = torch.nn.ModuleList([network]).train()
    assert not network.training and not any(parameter.requires_grad for parameter in holder.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    network(images, torch.rand(2, 3, 32, 32)).sum().backward()
    assert images.grad is not None and bool((images.grad != 0).any())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("value", [-1.0, 0.0, 50.0])
def test_lpips__equal_images_have_distance_0_and_a_gradient_that_is_a_number(value: float) -> None:
    network = random_network()
    for convolution in network.features:
        convolution.bias.data.fill_(-1.0)  # much of the network is silent: feature vectors of length 0
    images = torch.full((1, 3, 32, 32), value, requires_grad=True)
    distance = network(images, images.detach())
    distance.sum().backward()
    assert float(distance.detach()) == 0.0
    assert images.grad is not None and bool(images.grad.isfinite().all())
    other = network(images, torch.rand(1, 3, 32, 32))
    other.sum().backward()
    assert bool(images.grad.isfinite().all())


def test_lpips__targets_may_be_kept_and_autocast_changes_nothing() -> None:
    network = random_network()
    images, targets = torch.rand(3, 3, 32, 48), torch.rand(3, 3, 32, 48)
    expected = network(images, targets)
    assert expected.shape == (3,) and expected.dtype == torch.float32
    with torch.no_grad():
        levels = network.levels(targets)
    assert torch.equal(network(images, levels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images, targets), expected)
    torch.testing.assert_close(network(targets, images), expected)
    assert network(images[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("net", "images", "targets", "message"),
    [
        ("vgg", (1, 3, 32, 32), (2, 3, 32, 32), "are no pairs"),
        ("vgg", (1, 1, 32, 32), (1, 1, 32, 32), "at least 16 x 16 pixels"),
        ("vgg", (1, 3, 15, 32), (1, 3, 15, 32), "at least 16 x 16 pixels"),
        ("alex", (1, 3, 64, 30), (1, 3, 64, 30), "at least 31 x 31 pixels"),
    ],
)
def test_lpips__what_it_cannot_measure_is_refused(
    net: Net, images: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(QLIPError, match=message):
        LPIPS(net)(torch.zeros(images), torch.zeros(targets))


@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("alex", 31)])
def test_lpips__the_smallest_images_have_a_place_in_the_last_level(net: Net, side: int) -> None:
    network = LPIPS(net)
    assert [level.shape[2:].numel() for level in network.levels(torch.rand(1, 3, side, side))][-1] == 1


def test_lpips__another_network_is_refused() -> None:
    with pytest.raises(QLIPError, match="LPIPS knows the networks vgg and alex, got 'squeeze'"):
        LPIPS("squeeze")  # type: ignore[arg-type]
