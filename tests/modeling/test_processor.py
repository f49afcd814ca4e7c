"""Resizing, cropping and normalisation of images, and the way back to images."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.modeling import Preprocessing
from tests.modeling.helpers import FIXTURE, RED, WHITE, as_array, assert_one_line, photo


def test_processor__defaults_without_a_preprocessor_file(processor: QLIPProcessor) -> None:
    """Mean and std 0.5, bicubic, shorter side to the model's size, centre crop."""
    image = photo(64, 40)
    pixels = processor(images=image)["pixel_values"]
    resized = image.resize((51, 32), Image.Resampling.BICUBIC).crop((9, 0, 41, 32))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-6)
    assert processor.size == (32, 32)
    for colour, value in ((WHITE, 1.0), ((0, 0, 0), -1.0)):
        flat = processor(images=Image.new("RGB", (50, 50), colour))["pixel_values"]
        torch.testing.assert_close(flat, torch.full_like(flat, value))


def test_processor__follows_the_preprocessor_file(tmp_path: Path) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    settings = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "resample": 2,
        "do_center_crop": True,
        "image_mean": mean,
        "image_std": std,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = photo(80, 80)
    pixels = QLIPProcessor.from_pretrained(tmp_path)(images=image)["pixel_values"][0]
    cropped = image.resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    expected = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 255
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32, "crop_size": 32},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_read_preprocessing__three_formats_of_a_size(tmp_path: Path, settings: dict[str, Any]) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = QLIPProcessor.from_pretrained(tmp_path)
    assert processor(images=photo(50, 50))["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "settings",
    [
        "[]",
        "{",
        '{"resample": 17}',
        '{"image_mean": [0.5]}',
        '{"image_std": [0, 1, 1]}',
        '{"rescale_factor": 2}',
        '{"do_normalize": false}',
        '{"size": {"longest_edge": 3}}',
        '{"size": {"shortest_edge": 30}, "crop_size": 32}',
        '{"size": "large"}',
    ],
)
def test_read_preprocessing__unsupported_settings_are_refused(tmp_path: Path, settings: str) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(QLIPError) as error:
        QLIPProcessor.from_pretrained(tmp_path)
    assert "preprocessor_config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (33, 32), (10, 60), (64, 64), (1, 5), (3000, 20)])
def test_processor__keep_aspect(processor: QLIPProcessor, size: tuple[int, int]) -> None:
    """The shorter side is the model's; the longer one in proportion, cut down to a multiple of the patch."""
    pixels = processor(images=photo(*size), keep_aspect=True)["pixel_values"]
    height, width = pixels.shape[2:]
    assert (height % 4, width % 4) == (0, 0)
    assert min(height, width) == 32
    longer = max(size) / min(size) * 32
    assert longer - 4.5 <= max(height, width) <= longer + 0.5
    assert (width >= height) == (size[0] >= size[1]) or height == width


def test_processor__keep_aspect_with_different_sizes_is_refused(processor: QLIPProcessor) -> None:
    with pytest.raises(QLIPError, match=r"differ in size.*one by one"):
        processor(images=[photo(100, 50), photo(50, 100)], keep_aspect=True)


def test_to_images__inverts_the_normalisation(processor: QLIPProcessor) -> None:
    image = photo(32, 32)
    pixels = processor(images=image)["pixel_values"]
    for tensor in (pixels, pixels.double(), pixels.requires_grad_()):
        (again,) = processor.to_images(tensor)
        assert again.mode == "RGB"
        assert np.array_equal(as_array(again), as_array(image))
    assert np.abs(as_array(processor.to_images(pixels.bfloat16())[0]) - as_array(image)).max() <= 1
    beyond = processor.to_images(torch.tensor([-9.0, 9.0])[:, None, None, None].expand(2, 3, 4, 6))
    assert [image.size for image in beyond] == [(6, 4), (6, 4)]
    assert [image.getpixel((0, 0)) for image in beyond] == [(0, 0, 0), WHITE]


# --- equal to the reference --------------------------------------------------------------------------------------


def test_resized__equals_clip_image_processor_for_a_thousand_shapes() -> None:
    """Published checkpoints were made with transformers' processor; the longer side is truncated, not rounded."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()  # it asks for torchvision, which the slow processor does without
    reference = transformers.CLIPImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        do_normalize=False,
        do_rescale=False,
    )
    preprocessing = Preprocessing((24, 24), 24)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)
    shapes = rng.permutation([(height, width) for height in range(1, 90) for width in range(1, 90)])[:1000]
    for height, width in shapes.tolist():
        image = Image.fromarray(noise[:height, :width])
        wanted = np.asarray(reference(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        assert np.array_equal(as_array(preprocessing.resized(image)), wanted), (height, width)


def test_resized__a_very_long_image_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the crop is computed: equal to the crop of the whole but for rounding."""
    preprocessing = Preprocessing((32, 32), 32)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((7, 900), (300, 40))]
    images += [photo(50, 33), photo(1, 200)]
    whole = [as_array(preprocessing.resized(image)) for image in images]
    monkeypatch.setattr("qlip.modeling.processor.LARGEST_RESIZE", 0)
    for image, wanted in zip(images, whole, strict=True):
        assert np.abs(as_array(preprocessing.resized(image)) - wanted).max() <= 1
    monkeypatch.undo()
    assert preprocessing.resized(Image.new("RGB", (200_000, 1), RED)).getpixel((9, 9)) == RED  # 4 GB as a whole


def test_resized__keeps_an_aspect_ratio_within_bounds() -> None:
    preprocessing = Preprocessing((32, 32), 32, patch_size=8)
    assert preprocessing.resized(Image.new("RGB", (1000, 10)), keep_aspect=True).size == (3200, 32)
    with pytest.raises(QLIPError, match=r"20000 x 1 pixels keep .* 320,000 tokens, more than 16,384; crop"):
        preprocessing.resized(Image.new("RGB", (20_000, 1)), keep_aspect=True)


def test_fingerprint__of_preparation_knows_the_rules_and_the_profiles() -> None:
    """Tokens made with the rules of 0.1 are told apart."""
    preprocessing = Preprocessing((64, 64), 64, patch_size=8)
    ignoring = replace(preprocessing, color_profiles="ignore")
    assert len({preprocessing.fingerprint(), ignoring.fingerprint(), "7ba5589a27763374"}) == 3


def test_processor__colour_profiles_are_stored(tmp_path: Path, processor: QLIPProcessor) -> None:
    ignoring = QLIPProcessor(replace(processor.preprocessing, color_profiles="ignore"))
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    ignoring.save_pretrained(tmp_path)
    assert QLIPProcessor.from_pretrained(tmp_path).preprocessing == ignoring.preprocessing
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"ignore"', '"maybe"'))
    with pytest.raises(QLIPError, match="color_profiles 'maybe' is unknown"):
        QLIPProcessor.from_pretrained(tmp_path)


# --- habits of transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> QLIPProcessor:
    return QLIPProcessor.from_pretrained("bundled")


def test_processor__output_is_a_mapping_with_attributes_that_moves(bundled: QLIPProcessor) -> None:
    inputs = bundled(images=photo(), text=["a cat"], return_tensors="pt", padding=True, truncation=True)
    assert list(inputs) == ["pixel_values", "input_ids", "attention_mask"]
    assert inputs.pixel_values is inputs["pixel_values"]
    with pytest.raises(AttributeError, match="'labels'"):
        inputs.labels  # noqa: B018
    moved = pickle.loads(pickle.dumps(inputs)).to("cpu", torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64
    with pytest.raises(QLIPError, match="'np'"):
        bundled(images=photo(), return_tensors="np")  # type: ignore[arg-type]


def test_processor__padding_changes_no_embedding(bundled: QLIPProcessor) -> None:
    model, texts = QLIPModel.from_pretrained("bundled"), ["a cat", "a photo of two dogs on a beach"]
    whole, longest = bundled(text=texts), bundled(text=texts, padding=True)
    assert longest.input_ids.shape[1] == int(whole.attention_mask.sum(1).max()) < whole.input_ids.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model.embed_texts(**longest), model.embed_texts(**whole))
    short = bundled(text=texts, max_length=4)
    assert short.input_ids.shape == (2, 4) and short.input_ids[1, 3] == bundled.tokenizer.eos  # type: ignore[union-attr]
    assert bundled(text="a cat", padding=False).attention_mask.all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": ["a", "a photo of a cat"], "padding": False}, "padding=True"),
        ({"text": ["a", "a cat " * 50], "truncation": False}, "text 1 has more than"),
        ({"text": "a photo of a cat", "truncation": False, "max_length": 4}, "text 0 has more than 4"),
        ({"text": "a", "max_length": 1000}, "max_length 1000"),
        ({"text": "a", "padding": "left"}, "padding 'left'"),
        ({"text": ["a", None]}, "text 1 is None"),
        ({"text": [float("nan")]}, "text 0 is nan"),
        ({"text": 5}, "text is 5"),
        ({"images": [None]}, "NoneType is not an image"),
        ({"images": {"path": None}}, "'bytes' or 'path'"),
    ],
    ids=str,
)
def test_processor__wrong_arguments_are_one_line(bundled: QLIPProcessor, given: dict[str, Any], said: str) -> None:
    with pytest.raises(QLIPError) as error:
        bundled(**given)
    assert_one_line(error, said)


def test_processor__a_batch_in_one_array(processor: QLIPProcessor) -> None:
    arrays = np.stack([np.asarray(photo()), np.asarray(photo().rotate(180))])
    wanted = processor(images=list(arrays)).pixel_values
    for batch in (arrays, torch.from_numpy(arrays), torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255):
        assert torch.equal(processor(images=batch).pixel_values, wanted)


@pytest.mark.parametrize("pixels", [np.zeros((1, 3, 4, 4)), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4).int(), None])
def test_processor__other_pixels_become_no_image(processor: QLIPProcessor, pixels: Any) -> None:
    with pytest.raises(QLIPError, match=r"tensor of floats \(B, 3, H, W\)"):
        processor.to_images(pixels)
