"""Other people's models: rebuilt and embedded as their own code does, their bytes counted, faults named.

CLIP is transformers' own, tiny and random. What stands for diffusers here answers as its documentation says its models
do.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlip import QLIPError, QLIPProcessor
from qlip.evaluation.evaluators.codebook import Codebook
from qlip.evaluation.evaluators.reconstruction import Reconstruction
from qlip.evaluation.models.adapters import AutoencoderEvalModel, open_model
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.models.clip import CLIPEvalModel
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset

from .plain import Plain, opened
from .tiny import write_images


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with the bundled vocabulary and a preprocessing of its own."""
    folder = tmp_path_factory.mktemp("clip") / "clip-tiny"
    bundled = QLIPProcessor.from_pretrained("bundled")
    assert bundled.tokenizer is not None
    end = bundled.tokenizer.vocab_size - 1
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=tower
        | {"vocab_size": end + 1, "max_position_embeddings": 16, "bos_token_id": end - 1, "eos_token_id": end},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    bundled.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": 40, "crop_size": 32, "resample": 3, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]}'
    )
    return folder


def pixels(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


@torch.inference_mode()
def test_adapters__clip_embeds_and_reads_as_transformers_does(clip: Path) -> None:
    model = open_model(f"transformers.CLIPModel:{clip}")
    assert (
        isinstance(model, CLIPEvalModel)
        and model.capabilities == {"encode_image", "encode_text", "features"}
        and model.as_shipped
    )
    assert (model.preprocessing.size, model.preprocessing.shortest_edge) == ((32, 32), 40)
    assert model.preprocessing.mean == (0.48, 0.45, 0.4)
    network = transformers.CLIPModel.from_pretrained(clip).eval()
    seen, texts = pixels(3, 32), ["a cat", "a photo of a small dog"]
    ids, mask = model.tokenizer(texts)
    expected = network(input_ids=ids, attention_mask=mask, pixel_values=seen)
    torch.testing.assert_close(model.encode_image(seen), expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(texts), expected.text_embeds, atol=1e-6, rtol=0)
    features = model.features(seen)
    assert {name: tuple(one.shape) for name, one in features.items()} == {
        "cls": (3, 16),
        "mean": (3, 16),
        "both": (3, 32),
    }
    torch.testing.assert_close(features["cls"], network.vision_model(pixel_values=seen).pooler_output)


def test_adapters__a_fingerprint_changes_with_a_weight(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "other")
    weights = load_file(clip / "model.safetensors")
    weights["text_projection.weight"] = weights["text_projection.weight"] + 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    prints = [open_model(f"transformers.CLIPModel:{folder}").fingerprint for folder in (clip, clip, tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 64


def test_adapters__a_checkpoint_with_weights_missing_or_pickled_is_refused(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "other")
    weights = load_file(clip / "model.safetensors")
    del weights["text_projection.weight"]
    file = tmp_path / "other" / "model.safetensors"
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(QLIPError, match="has no weights for 1 tensors of a CLIPModel, such as text_projection.weight"):
        open_model(f"transformers.CLIPModel:{file.parent}")
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(QLIPError, match="cannot be read as safetensors") as refused:
        open_model(f"transformers.CLIPModel:{file.parent}")
    assert "\n" not in str(refused.value)


@dataclass
class Distribution:
    mean: Tensor

    def mode(self) -> Tensor:
        return self.mean


class Diffused(nn.Module):
    """What diffusers' autoencoders have in common."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    @classmethod
    def from_pretrained(
        cls, where: str, use_safetensors: bool, output_loading_info: bool, subfolder: str | None = None
    ) -> tuple[Diffused, dict[str, list[str]]]:
        assert use_safetensors and output_loading_info
        if where == "nowhere":
            raise OSError("Error no file named config.json\nfound in directory nowhere.")
        torch.manual_seed(0)
        return cls(sample_size=8 if subfolder is None else 16, num_vq_embeddings=16), {"missing_keys": []}


class AutoencoderKL(Diffused):
    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=Distribution(self.down(x)))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.up(z))


class VQModel(Diffused):
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.book = nn.Embedding(16, 4)

    def quantize(self, latents: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        flat = latents.permute(0, 2, 3, 1)
        chosen = torch.cdist(flat.reshape(-1, 4), self.book.weight).argmin(1)
        return self.book(chosen).view(flat.shape).permute(0, 3, 1, 2), None, (None, None, chosen)

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.down(x))

    def decode(self, h: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.up(self.quantize(h)[0]))


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("diffusers")
    module.AutoencoderKL, module.VQModel, module.UNet = AutoencoderKL, VQModel, Diffused  # type: ignore[attr-defined]
    module.utils = pytest.importorskip("transformers").utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", module)


@torch.inference_mode()
def test_adapters__a_latent_that_is_no_code_is_rounded_to_what_it_counts(diffusers: None) -> None:
    model = open_model("diffusers.AutoencoderKL:somebody/vae")
    assert (
        isinstance(model, AutoencoderEvalModel) and model.capabilities == {"reconstruct"} and model.group_size is None
    )
    assert model.name == "AutoencoderKL vae" and model.as_shipped
    found, seen = model.reconstruct(pixels(2, 8)), pixels(2, 8)
    assert found.num_bytes.tolist() == [2 * 4 * 4 * 4] * 2 and found.indices is None
    network = model.model
    expected = network.up(network.down(seen).half().float())  # type: ignore[operator]
    torch.testing.assert_close(found.pixels, ((expected + 1) / 2).clamp(0, 1), atol=0, rtol=0)
    assert "no code" in model.notes["bits_per_pixel"]
    with pytest.raises(QLIPError, match="no codebook"):
        model.tokenize(seen)


@torch.inference_mode()
def test_adapters__latents_with_a_codebook_are_tokens(diffusers: None) -> None:
    model = open_model("diffusers.VQModel:somebody/vq")
    seen = pixels(3, 8)
    found = model.reconstruct(seen)
    assert found.num_bytes.tolist() == [16 * 4 // 8] * 3 and model.group_size == 4 and not model.notes
    network = model.model  # type: ignore[attr-defined]
    decoded = network.up(network.book(found.indices[..., 0]).view(3, 4, 4, 4).permute(0, 3, 1, 2))  # type: ignore[index]
    torch.testing.assert_close(found.pixels, ((decoded + 1) / 2).clamp(0, 1))


@torch.inference_mode()
def test_adapters__a_codebook_of_another_size_than_a_power_of_two(diffusers: None, tmp_path: Path) -> None:
    network = VQModel(sample_size=16, num_vq_embeddings=12).eval()
    network.book = nn.Embedding(12, 4)
    model = AutoencoderEvalModel(network, "twelve")
    found = model.reconstruct(pixels(3, 16))
    assert model.group_size == 4 and found.num_bytes.tolist() == [math.ceil(64 * math.log2(12) / 8)] * 3
    assert found.indices is not None and torch.equal(found.indices, model.tokenize(pixels(3, 16)))
    write_images(tmp_path, 4, 16, seed=1)
    passed = evaluate_dataset(model, opened(tmp_path, model), [Reconstruction(shrink=False), Codebook()])
    assert passed is not None
    assert passed.metric_results["reconstruction"].values["bits_per_pixel"].value == 8 * 29 / 256
    assert "12 values" in passed.metric_results["codebook"].notes["codebook"]


@torch.inference_mode()
def test_adapters__another_size_is_named_and_must_fit(diffusers: None) -> None:
    assert open_model("diffusers.AutoencoderKL:somebody/pipeline#vae").preprocessing.size == (16, 16)
    other = open_model("diffusers.AutoencoderKL:somebody/vae", size=(12, 10))
    assert other.preprocessing.size == (12, 10) and not other.as_shipped
    odd = open_model("diffusers.AutoencoderKL:somebody/vae", size=(9, 9))
    with pytest.raises(QLIPError, match="multiples of what it shrinks images by"):
        odd.reconstruct(pixels(1, 9))


def test_adapters__what_cannot_be_opened_is_named(diffusers: None, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    for spec, message in {
        "diffusers.AutoencoderKL:nowhere": r"nowhere: AutoencoderKL cannot be read as safetensors \(Error no file",
        "diffusers.Autoencodr:x/y": "diffusers has no such model",
        "diffusers.UNet:x/y": "has no encode and no decode",
        "transformers.CLIPModel:./nowhere": "no such folder",
        "no_such_module:make": "no module no_such_module",
        "math:make": "math:make: the module has no make",
        "math:pi": "is not callable",
        "builtins:dict": "made a dict, not a qlip.evaluation.models.base.EvalModel",
        "mine": "no model of that name",
    }.items():
        with pytest.raises(QLIPError, match=message):
            open_model(spec)
    with pytest.raises(QLIPError, match="CLIP sees 32x32 pixels and no others"):
        open_model(f"transformers.CLIPModel:{clip}", size=(64, 64))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(QLIPError, match=r"needs the package 'diffusers': pip install .*\[hf\]"):
        open_model("diffusers.AutoencoderKL:x/y")


def made(argument: str = "8") -> EvalModel:
    """What another package would register."""
    return Plain(int(argument), lambda images: images)


def test_adapters__a_python_callable_makes_a_model() -> None:
    assert open_model(f"{__name__}:made").preprocessing.size == (8, 8)
    assert open_model(f"{__name__}:made:24").preprocessing.size == (24, 24)


def test_adapters__a_registered_model_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="theirs", load=lambda: made)
    monkeypatch.setattr(
        "qlip.evaluation.models.adapters.entry_points", lambda group: [point] if group == "qlip.subjects" else []
    )
    assert open_model("theirs").preprocessing.size == (8, 8)
    assert open_model("theirs:16").preprocessing.size == (16, 16)
    with pytest.raises(QLIPError, match="did you mean 'theirs'"):
        open_model("their")
