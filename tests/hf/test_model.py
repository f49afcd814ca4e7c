"""transformers' models: numbers equal to ours to the last bit, hidden states for LLaVA, files both read."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, CLIPModel, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from qlip import QLIPError, QLIPModel
from qlip.hf import QLIPHFConfig, QLIPHFModel, QLIPHFTextModel, QLIPHFVisionModel
from qlip.modeling.checkpoint import resolve
from tests.modeling.helpers import MODEL_FIXTURES, load_fixture


@pytest.fixture(scope="module")
def tower() -> QLIPHFVisionModel:
    return QLIPHFVisionModel.from_pretrained("bundled", dtype=torch.float32)


@torch.no_grad()
def test_model__outputs_equal_ours_to_the_last_bit(ours: QLIPModel, theirs: Any, inputs: dict[str, Tensor]) -> None:
    expected = ours(**inputs, output_hidden_states=True)
    found = theirs(**inputs, output_hidden_states=True, reconstruct=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "reconstructions", "indices"):
        assert torch.equal(found[name], getattr(expected, name)), name
    for side in ("text_model_output", "vision_model_output"):
        pairs = zip(found[side].hidden_states, getattr(expected, side).hidden_states, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert torch.equal(found[side].last_hidden_state, getattr(expected, side).last_hidden_state)
    assert theirs(**inputs).reconstructions is None
    two = {"pixel_values": inputs["pixel_values"][:2]}
    assert torch.equal(theirs(**(inputs | two), return_loss=True).loss, ours(**(inputs | two), return_loss=True).loss)


@torch.no_grad()
def test_model__features_and_tokens_equal_ours(ours: QLIPModel, theirs: Any, inputs: dict[str, Tensor]) -> None:
    pixels, texts = inputs["pixel_values"], (inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(theirs.get_image_features(pixels), ours.get_image_features(pixels))
    assert torch.equal(theirs.get_text_features(*texts), ours.get_text_features(*texts))
    indices = theirs.encode(pixels)
    assert torch.equal(indices, ours.encode(pixels))
    assert torch.equal(theirs.decode(indices, (8, 8)), ours.decode(indices))
    text = QLIPHFTextModel.from_pretrained("bundled", dtype=torch.float32)
    assert torch.equal(text(*texts).pooler_output, ours.text_model(*texts).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("name", MODEL_FIXTURES)
def test_model__reads_the_published_layout(name: str) -> None:
    stored = load_fixture(name)
    ours, theirs = QLIPModel.from_pretrained(stored.folder), QLIPHFModel.from_pretrained(stored.folder)
    pixels = stored.inputs["pixel_values"]
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(theirs.get_image_features(pixels), ours.get_image_features(pixels))
    assert torch.equal(theirs.encode(pixels), ours.encode(pixels))


@torch.no_grad()
def test_model__saved_and_loaded_by_auto_model_and_by_ours(
    ours: QLIPModel, theirs: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qlip"
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is QLIPHFModel
    assert torch.equal(again(**inputs).logits_per_image, ours(**inputs).logits_per_image)
    assert QLIPModel.from_pretrained(tmp_path).code_fingerprint == ours.code_fingerprint


def test_model__random_weights_are_finite_and_seeded(inputs: dict[str, Tensor]) -> None:
    config = QLIPHFConfig.from_pretrained("bundled")

    def random() -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            logits: Tensor = AutoModel.from_config(config).float().eval()(**inputs).logits_per_image
        return logits

    assert torch.isfinite(random()).all() and torch.equal(random(), random())


@torch.no_grad()
@pytest.mark.parametrize("layers", [-2, 0, 4, -5, [-2, -1], (1, -2)])
def test_vision_model__hidden_states_of_the_asked_layers(
    tower: QLIPHFVisionModel, ours: QLIPModel, inputs: dict[str, Tensor], layers: Any
) -> None:
    pixels, ran = inputs["pixel_values"], []
    every = ours.vision_model(pixels, output_hidden_states=True).hidden_states
    hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in tower.vision_model.encoder.layers]
    found = tower(pixels, output_hidden_states=layers).hidden_states
    for hook in hooks:
        hook.remove()
    wanted = [layers] if isinstance(layers, int) else layers
    assert len(found) == len(every) == 5
    assert all(torch.equal(found[layer], every[layer]) for layer in wanted)
    assert len(ran) == max(layer % 5 for layer in wanted)  # blocks after the last wanted layer do not run


@torch.no_grad()
def test_vision_model__whole_output(tower: QLIPHFVisionModel, ours: QLIPModel, inputs: dict[str, Tensor]) -> None:
    expected = ours.vision_model(inputs["pixel_values"], output_hidden_states=True)
    found = tower(inputs["pixel_values"])
    assert found.hidden_states is None
    assert torch.equal(found.last_hidden_state, expected.hidden_states[-1])
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert len(tower(inputs["pixel_values"], output_hidden_states=True).hidden_states) == 5
    assert isinstance(tower(inputs["pixel_values"], return_dict=False), tuple)
    with pytest.raises(QLIPError, match="layer 5 does not exist: the encoder has 4; choose -5 to 4"):
        tower(inputs["pixel_values"], output_hidden_states=5)


@torch.no_grad()
def test_vision_model__is_the_tower_of_llava(ours: QLIPModel, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    language = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    vision = QLIPHFConfig.from_pretrained("bundled", dtype=torch.float32).vision_config
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=96, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.vision_model.load_state_dict(ours.vision_model.state_dict())
    ids = torch.tensor([[1, *[96] * 64, 5, 6]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][:1]}
    expected = model.model.multi_modal_projector(ours.get_patch_features(given["pixel_values"]))
    found: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(lambda _, __, output: found.append(output))
    blocks: list[int] = []
    model.model.vision_tower.vision_model.encoder.layers[-1].register_forward_hook(lambda *_: blocks.append(1))
    logits = model(**given).logits
    assert not blocks or transformers.__version__.startswith("4.")  # version 5 passes the wanted layer
    assert torch.equal(found[0], expected)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**given, **greedy), model.generate(**given, **greedy))


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # version 5 renames it
def test_vision_model__gradient_checkpointing_runs_blocks_twice_with_equal_gradients(inputs: dict[str, Tensor]) -> None:
    vision = QLIPHFConfig.from_pretrained("bundled", dtype=torch.float32).vision_config
    language = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=language)).train()
    tower, runs = model.model.vision_tower, list[int]()
    first = tower.vision_model.encoder.layers[0]
    first.layer_norm1.register_forward_hook(lambda *_: runs.append(1))

    def gradient() -> Tensor:
        model.zero_grad()
        tower(inputs["pixel_values"]).last_hidden_state.square().mean().backward()
        found: Tensor = first.mlp.w1.weight.grad.clone()
        return found

    plain = gradient()
    model.gradient_checkpointing_enable()  # LLaVA's own, which asks its parts
    assert tower.gradient_checkpointing
    torch.testing.assert_close(gradient(), plain)
    assert len(runs) == 3
    model.gradient_checkpointing_disable()
    assert not tower.gradient_checkpointing


def test_config__faults_are_named_when_a_model_is_built() -> None:
    config = QLIPHFConfig.from_pretrained("bundled")
    config.vision_config.num_attention_heads = 5
    with pytest.raises(QLIPError, match="num_attention_heads 5 does not divide hidden_size 192"):
        QLIPHFModel(config)


def test_import__names_the_absent_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "qlip.hf")
    with pytest.raises(QLIPError, match=r"this needs the package 'transformers': .*\[hf"):
        importlib.import_module("qlip.hf")


def test_stock_classes__refuse_a_folder_of_ours_and_quote_the_remedy(ours: QLIPModel, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    for folder in (tmp_path, resolve("bundled")):
        for kind in (AutoModel, CLIPModel, CLIPVisionModel):
            with pytest.raises(ValueError, match=r"is a QLIP.*load it with qlip\.QLIPModel or qlip\.hf\.QLIPHFModel"):
                kind.from_pretrained(folder)
    again = QLIPModel.from_pretrained(tmp_path)
    assert again.code_fingerprint == ours.code_fingerprint
    for part in (QLIPHFModel, QLIPHFVisionModel, QLIPHFTextModel):
        written = tmp_path / part.__name__
        part.from_pretrained(tmp_path).save_pretrained(written)
        assert "transformers_weights" not in (written / "config.json").read_text()
    back = tmp_path / "back"
    QLIPModel.from_pretrained(tmp_path / "QLIPHFModel").save_pretrained(back)  # keeps its own model type
    assert type(AutoModel.from_pretrained(back)) is QLIPHFModel
