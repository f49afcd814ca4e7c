"""QLIP's encoder under the interface by which the LLaVA repository and LLaVA-NeXT call a vision tower."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.vlm.llava import QLIPVisionTower

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))


def settings(**changes: Any) -> SimpleNamespace:
    """What the repository's arguments and configurations hold of a tower."""
    return SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch", **changes)


@pytest.fixture(scope="module")
def ours() -> QLIPModel:
    return QLIPModel.from_pretrained("bundled")


def test_tower__as_the_repository_builds_loads_and_calls_it(ours: QLIPModel) -> None:
    # the constructor of the language model, then the builder's call, then that of its training
    tower = QLIPVisionTower("bundled", args=settings(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size) == (192, 64, 8, 64)
    projector = torch.nn.Linear(tower.hidden_size, 32)
    tower.load_model(device_map={"": "cpu"})
    weights = tower.vision_tower
    tower.load_model(device_map="auto")
    assert tower.is_loaded and tower.vision_tower is weights
    assert not any(one.requires_grad for one in tower.parameters())

    processor = tower.image_processor
    expected = QLIPProcessor.from_pretrained("bundled")(images=[IMAGE])["pixel_values"]
    pixels = processor.preprocess(IMAGE, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, expected[0]) and torch.equal(processor([IMAGE])["pixel_values"], expected)
    assert [int(255 * one) for one in processor.image_mean] == [127, 127, 127]
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (64, 64)

    features = tower(pixels[None])
    assert torch.equal(features, ours.get_patch_features(pixels[None])) and not features.requires_grad
    [alone, wide] = tower([pixels, torch.cat((pixels, pixels), -1)])
    assert torch.equal(alone, features) and wide.shape == (1, 128, 192)
    assert projector(features).shape == (1, 64, 32)
    assert tower.dummy_feature.shape == (1, 192)
    assert tower(pixels[None].bfloat16()).dtype == torch.bfloat16  # of the images, whatever the weights' is
    tower.to(dtype=torch.bfloat16)
    assert (tower.dtype, tower.device.type, tower.dummy_feature.dtype) == (torch.bfloat16, "cpu", torch.bfloat16)


def test_tower__layer_cls_and_blocks_that_never_run(ours: QLIPModel) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    every = ours.vision_model(pixels, output_hidden_states=True).hidden_states
    assert every is not None
    for layer in (-2, 0, 3, -1):
        tower = QLIPVisionTower("bundled", settings() if layer == -2 else SimpleNamespace(mm_vision_select_layer=layer))
        ran: list[int] = []
        for block in tower.vision_tower.encoder.layers:
            block.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        assert torch.equal(tower(pixels), every[layer][:, 1:])
        assert len(ran) == layer % 5
    whole = QLIPVisionTower("bundled", SimpleNamespace(mm_vision_select_feature="cls_patch"))
    assert torch.equal(whole(pixels), every[-2])


def test_tower__trains_where_its_parameters_are_freed() -> None:
    tuned = settings(mm_tunable_parts="mm_vision_tower,mm_mlp_adapter")
    assert QLIPVisionTower("bundled", tuned, delay_load=True).is_loaded
    assert not QLIPVisionTower("bundled", settings(mm_tunable_parts=None), delay_load=True).is_loaded
    tower = QLIPVisionTower("bundled", settings(unfreeze_mm_vision_tower=True), delay_load=True)
    assert tower.is_loaded
    tower.requires_grad_(True)
    tower(torch.randn(1, 3, 64, 64)).sum().backward()
    assert tower.vision_tower.encoder.layers[0].self_attn.q_proj.weight.grad is not None
    assert tower.vision_tower.encoder.layers[-1].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bundled", {"mm_vision_select_layer": -6}, "mm_vision_select_layer -6: the encoder has 4; choose -5 to 4"),
        ("bundled", {"mm_vision_select_feature": "slicefour"}, "'slicefour': take patch or cls_patch"),
        ("openai/../clip/x", {}, "no such folder"),
    ],
)
def test_tower__faults_are_one_line(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(QLIPError) as error:
        QLIPVisionTower(name, SimpleNamespace(**changes), delay_load=True)
    assert said in str(error.value) and "\n" not in str(error.value)
