"""Networks by name, their fingerprints, and what only FID's takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip import QLIPError
from qlip.evaluation.networks import NETWORKS, Inception, ResNet50, VGG16Features, load
from qlip.evaluation.networks.lpips import LPIPS

from ...weights import lpips_weights
from ..tiny import Tiny


def test_load_network__only_inception_is_called_fid() -> None:
    assert NETWORKS == ("fd_vgg16", "fd_resnet50", "fid")
    assert {one.name for one in (VGG16Features, ResNet50)} == {"fd_vgg16", "fd_resnet50"}
    assert Inception.name == "fid" and Inception.short == "inception"


def test_load_network__names_and_settings_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path))
    with pytest.raises(
        QLIPError,
        match=r"^fd_vgg19: no such feature network \(did you mean 'fd_vgg16'\?\); there are fd_vgg16, fd_res",
    ):
        load("fd_vgg19")
    with pytest.raises(QLIPError, match="fd_resnet50: its weights and input are what they are; only fid takes others"):
        load("fd_resnet50", weights=tmp_path / "mine.pth")
    with pytest.raises(QLIPError, match="resnet50: not in .*; fetch it with `qlip data get resnet50`"):
        load("fd_resnet50")
    with pytest.raises(QLIPError, match="inception: not in .*; fetch it with `qlip data get inception`"):
        load("fid")
    (tmp_path / "mine.pth").write_bytes(b"x")
    with pytest.raises(QLIPError, match="mine.pth: SHA-256 is .* with other weights a distance is not FID"):
        load("fid", weights=tmp_path / "mine.pth")


def test_load_network__a_fingerprint_is_of_all_weights() -> None:
    torch.manual_seed(0)
    network = VGG16Features(LPIPS("vgg"))
    first = network.fingerprint()
    assert first == VGG16Features(network.network).fingerprint() and len(first) == 64
    network.network.features[3].bias.data[5] += 1e-6
    assert network.fingerprint() != first
    assert network.described() == {"network": "fd_vgg16", "weights": network.fingerprint(), "input": network.input}


def test_load_network__vgg_looks_at_images() -> None:
    lpips_weights()
    network = load()
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.features(images), network(2 * images - 1))
    with pytest.raises(QLIPError, match=r"fd_vgg16 takes .* of at least 16 x 16 pixels"):
        network.features(images[:, :, :8])


def test_load_network__pieces_are_the_whole() -> None:
    network, images = Tiny(), torch.rand(9, 3, 512, 400, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    look = network.features
    network.features = lambda some: (sizes.append(len(some)), look(some))[1]  # type: ignore[method-assign]
    torch.testing.assert_close(network.features_in_pieces(images), look(images))
    assert sizes == [2, 2, 2, 2, 1]  # no more than half a million pixels at once
