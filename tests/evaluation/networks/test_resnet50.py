"""ResNet-50: what it sees on photographs, and how images come to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qlip import QLIPError, assets
from qlip.data.public import read_manifest, resnet50
from qlip.data.public.cache import verified_file
from qlip.evaluation.networks import ResNet50

EXPECTED = {
    "cat": {"Egyptian cat", "tiger cat", "tabby"},
    "coffee": {"espresso"},
    "dog": {"cocker spaniel"},
    "mountains": {"alp"},
    "temple": {"bell cote", "palace", "monastery"},
}


def bundled(name: str) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    image = Image.open(assets.path("images", f"{name}.jpg")).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_resnet50__names_what_is_on_photographs() -> None:
    if read_manifest("resnet50") is None:
        pytest.skip("its weights are not in the cache; qlip data get resnet50")
    network, classes = ResNet50.from_cache(), json.loads(verified_file("resnet50", resnet50.CLASSES_FILE).read_text())
    for name, right in EXPECTED.items():
        shares = network.classify(bundled(name))[0].softmax(0)
        assert classes[int(shares.argmax())] in right, name
        assert float(shares.max()) > 0.5


@pytest.fixture(scope="module")
def network() -> ResNet50:
    torch.manual_seed(0)
    return ResNet50()


def test_resnet50__images_come_as_caffes_did(network: ResNet50) -> None:
    seen: list[Tensor] = []
    hook = network.layers["conv1"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    features = network.features(images)
    hook.remove()
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and bool((features >= 0).all())
    inner = seen[0][:, :, 3:-3, 3:-3]  # the border is laid on after the colours
    assert seen[0].shape == (2, 3, 230, 230) and float(seen[0][:, :, :3].abs().max()) == 0
    for place, (channel, colour) in enumerate(((2, 103.939), (1, 116.779), (0, 123.68))):
        torch.testing.assert_close(inner[:, place], 255 * images[:, channel] - colour)


def test_resnet50__other_sizes_are_resized_and_batch_mates_do_not_matter(network: ResNet50) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    features = network.features(images)
    resized = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(features, network.features(resized))
    torch.testing.assert_close(features[1:], network.features(images[1:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        QLIPError, match=r"fd_resnet50 takes \(B, 3, H, W\) of at least 1 x 1 pixels, got \(2, 1, 8, 8\)"
    ):
        network.features(torch.zeros(2, 1, 8, 8))


def test_resnet50__names_and_numbers_are_keras(network: ResNet50) -> None:
    # 25,636,712 in Keras' summary, of which 53,120 are statistics of the normalisations
    parameters = sum(one.numel() for one in network.parameters())
    statistics = sum(one.numel() for name, one in network.state_dict().items() if "running" in name)
    assert (parameters + statistics, statistics) == (25_636_712, 53_120)
    assert {f"layers.{name}.weight" for pair in resnet50.layers() for name in pair} <= network.state_dict().keys()
    strides = {name: one.stride for name, one in network.layers.items() if getattr(one, "stride", (1, 1)) != (1, 1)}
    assert strides.keys() == {"conv1"} | {f"res{stage}a_branch{end}" for stage in (3, 4, 5) for end in ("2a", "1")}
    assert not network.train().training and not any(one.requires_grad for one in network.parameters())
