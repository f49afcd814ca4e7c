"""The Frechet distance against closed forms and SciPy's matrix root, and the features it is usually over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn import functional as F

from qlip import QLIPError
from qlip.evaluation.metrics.frechet import Moments, frechet_distance
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.networks.lpips import LPIPS


def rows(count: int, dimensions: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, dtype=torch.float64, generator=generator)
    return shift + scale * torch.randn(count, dimensions, dtype=torch.float64, generator=generator) @ mixing


def counted(features: Tensor, batch: int = 37) -> Moments:
    moments = Moments(features.shape[1])
    for piece in features.split(batch):
        moments.add(piece)
    return moments


def given(mean: Tensor, covariance: Tensor, count: int = 1000) -> Moments:
    """Moments of a Gaussian that nobody sampled: rows whose mean and covariance are these."""
    dimensions = len(mean)
    seen, _ = torch.linalg.qr(rows(count, dimensions + 1, 9).index_fill(1, torch.tensor([0]), 1.0))
    white = seen[:, 1:] * (count - 1) ** 0.5  # orthogonal to the column of ones: zero mean, unit covariance
    return counted(mean + white @ torch.linalg.cholesky(covariance).t())


def test_frechet__moments_are_numpys_however_the_rows_come() -> None:
    features = rows(200, 6, 0, shift=1e6)  # a large mean drowns what is summed carelessly
    whole = counted(features)
    np.testing.assert_allclose(whole.mean.numpy(), features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance.numpy(), np.cov(features.numpy().T), rtol=1e-8)
    merged = counted(features[:7])
    merged.merge(counted(features[7:]))
    merged.merge(Moments(6))
    assert merged.count == whole.count == 200
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-8, atol=1e-8)


def test_frechet__gaussians_whose_distance_is_known() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first, second = torch.tensor([4.0, 1.0, 9.0]).double(), torch.tensor([1.0, 16.0, 9.0]).double()
    # commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2
    expected = float(mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    found = frechet_distance(given(torch.zeros_like(mean), first.diag()), given(mean, second.diag()))
    assert found.distance == pytest.approx(expected, rel=1e-9)
    assert found.warning is None


def test_frechet__covariances_that_do_not_commute_against_scipy() -> None:
    first, second = counted(rows(300, 12, 1)), counted(rows(500, 12, 2, scale=2.0, shift=0.3))
    product = sqrtm(first.covariance.numpy() @ second.covariance.numpy())
    expected = float((first.mean - second.mean).square().sum())
    expected += float(np.trace(first.covariance + second.covariance) - 2 * np.trace(product).real)
    assert frechet_distance(first, second).distance == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first).distance == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("count", [300, 10])
def test_frechet__a_set_is_no_way_from_itself_even_where_its_covariance_is_singular(count: int) -> None:
    features = rows(count, 24, 3)
    found = frechet_distance(counted(features), counted(features.flip(0), batch=11))
    scale = float(counted(features).covariance.trace())
    assert 0 <= found.distance < 1e-10 * scale
    assert (found.warning is None) == (count > 24)
    if found.warning:
        assert found.warning.startswith("10 images for 24 features")


def test_frechet__what_has_no_distance_is_refused() -> None:
    with pytest.raises(QLIPError, match="two images or more, got 1"):
        frechet_distance(counted(rows(1, 3, 0)), counted(rows(9, 3, 0)))
    with pytest.raises(QLIPError, match="have no distance"):
        frechet_distance(counted(rows(9, 3, 0)), counted(rows(9, 4, 0)))
    with pytest.raises(QLIPError, match="must be"):
        counted(rows(9, 3, 0)).add(rows(9, 4, 0))


@pytest.fixture(scope="module")
def network() -> LPIPS:
    """Of random weights: what is tested is where the features are taken."""
    torch.manual_seed(0)
    return LPIPS("vgg")


def test_frechet__features_are_the_last_activations_averaged(network: LPIPS) -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = VGG16Features(network)
    x = images - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    x = x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    for number, convolution in enumerate(network.features):
        x = F.relu(convolution(x))
        if number in (1, 3, 6, 9):
            x = F.max_pool2d(x, 2, 2)
    torch.testing.assert_close(features(images), x.mean((2, 3)))
    assert features.dimensions == 512
    with pytest.raises(QLIPError, match="vgg"):
        VGG16Features(LPIPS("alex"))
