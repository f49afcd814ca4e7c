"""Every option of the configuration against the literal forward, forward and backward, on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlip import QLIPConfig, QLIPModel
from qlip.modeling.indices import indices_to_bits
from tests.literal import literal_forward
from tests.modeling.helpers import assert_close, assert_grad_close, persample_allowance, small_config

PLAIN = {"grid__rope": False, "grid__subln": False, "grid__swiglu": False}
IDENTITY = {
    "vision_config__quantizer_embed_type": "identity",
    "vision_config__quantizer_cfg": {"embed_dim": 32, "group_size": 8, "input_format": "blc"},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "plain": PLAIN,
    "rope alone": {**PLAIN, "grid__rope": True},
    "sub-LN alone": {**PLAIN, "grid__subln": True},
    "swiglu alone": {**PLAIN, "grid__swiglu": True},
    "identity bottleneck": IDENTITY,
    "identity bottleneck, not on the sphere": {**IDENTITY, "vision_config__quantizer_l2_norm": False},
    "latents not on the sphere": {"vision_config__quantizer_l2_norm": False},
    "codes not scaled": {"vision_config__quantizer_cfg__l2_norm": False},
    "neither": {"vision_config__quantizer_l2_norm": False, "vision_config__quantizer_cfg__l2_norm": False},
    "text swiglu": {"text_config__swiglu": True},
    "text sub-LN": {"text_config__subln": True},
    "text swiglu and sub-LN": {"text_config__swiglu": True, "text_config__subln": True},
    "argmax pooling": {"text_config__eos_token_id": 2},
    "no bias anywhere": {f"towers__{name}_bias": False for name in "qkv"},
    "biases mixed": {
        "text_config__q_bias": False,
        "vision_config__v_bias": False,
        "vision_config__k_bias": True,
        "decoder_config__q_bias": False,
        "vision_projection_bias": False,
        "text_projection_bias": True,
    },
    "analytical": {"vision_config__quantizer_cfg__persample_entropy_compute": "analytical"},
    "loss weights": {
        "vision_config__quantizer_cfg__beta": 0.7,
        "vision_config__quantizer_cfg__gamma_0": 0.4,
        "vision_config__quantizer_cfg__gamma_1": 1.7,
        "vision_config__quantizer_cfg__inv_temperature": 13.0,
    },
    "groups of one bit": {"vision_config__quantizer_cfg__group_size": 1},
    "one group": {"vision_config__quantizer_cfg__group_size": 12},
    "epsilons": {"vision_config__layer_norm_eps": 1e-3, "text_config__layer_norm_eps": 1e-4},
    "decoder of another size": {
        "decoder_config__hidden_size": 24,
        "decoder_config__num_attention_heads": 3,
        "decoder_config__num_hidden_layers": 1,
        "decoder_config__intermediate_size": 30,
        "vision_config__hidden_size_post_q": 24,
    },
    "quick gelu": {**PLAIN, "towers__hidden_act": "quick_gelu"},
    "one patch": {"grid__image_size": 4},
    "decoder options of its own": {
        "decoder_config__rope": False,
        "decoder_config__swiglu": False,
        "decoder_config__layer_norm_eps": 1e-4,
    },
}


def _model(config: dict[str, Any], seed: int = 0) -> QLIPModel:
    """A model whose every parameter is random and matters, norms' weights and biases too."""
    torch.manual_seed(seed)
    model = QLIPModel(QLIPConfig.from_dict(config)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.12)
    return model


def _texts(config: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with the end token at different places, twice, or nowhere, and a mask that ends behind it."""
    text = config["text_config"]
    length, end = text["max_position_embeddings"], text["eos_token_id"]
    ids = torch.randint(3, text["vocab_size"] - 2, (count, length))
    for row in range(count):
        if row % 4 != 3:
            ids[row, 2 + row % (length - 3)] = end
            ids[row, length - 1] = end
    positions = torch.arange(length)[None]
    return ids, (positions <= 3 + torch.arange(count)[:, None]).long()


def _compare(config: dict[str, Any], *, images: int = 3, padded: bool = False, seed: int = 0) -> None:
    model = _model(config, seed)
    size = config["vision_config"]["image_size"]
    pixels = torch.randn(images, 3, size, size)
    ids, mask = _texts(config, images)
    attention_mask = mask if padded else None

    state = model.state_dict()
    parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in state.items()}
    literal = literal_forward(parameters, config, pixels, ids, attention_mask, train=True)
    output = model(pixels, ids, attention_mask, return_loss=True, output_hidden_states=True)

    # a bit is a step: it may differ only where the latent is as near to 0 as floats are
    latents = literal["quantizer.input"]
    disagreement = indices_to_bits(output.indices, model.group_size) != (latents > 0)
    if disagreement.any():
        assert latents[disagreement].abs().max().item() < 1e-6
        return

    vision, text = output.vision_model_output, output.text_model_output
    computed = {
        "text_embeds": output.text_embeds,
        "image_embeds": output.image_embeds,
        "logits_per_text": output.logits_per_text,
        "logits_per_image": output.logits_per_image,
        "loss": output.loss,
        "reconstructions": output.reconstructions,
        "vision.last_hidden_state": vision.last_hidden_state,
        "vision.pooler_output": vision.pooler_output,
        "text.last_hidden_state": text.last_hidden_state,
        "text.pooler_output": text.pooler_output,
        "quantizer.output": vision.quantizer.codes,
        "quantizer.H": output.codebook_entropy,
        "quantizer.commitment": output.commitment,
    }
    computed |= {f"vision.hidden_states.{i}": state for i, state in enumerate(vision.hidden_states)}
    computed |= {f"text.hidden_states.{i}": state for i, state in enumerate(text.hidden_states)}
    for name, value in computed.items():
        assert_close(name, value.detach(), literal[name].detach())
    assert torch.equal(output.indices, literal["group_indices"])

    quantizer = model.config.vision_config.quantizer_cfg
    group_size = 1 if quantizer.persample_entropy_compute == "analytical" else quantizer.group_size
    allowance = persample_allowance(group_size, quantizer.embed_dim // group_size)
    assert_close("S", output.persample_entropy.detach(), literal["quantizer.S"].detach(), extra=allowance)
    in_loss = allowance * quantizer.gamma_0 / quantizer.inv_temperature
    assert_close("L_bsq", output.quantizer_loss.detach(), literal["quantizer.loss"].detach(), extra=in_loss)

    (F.mse_loss(output.reconstructions, pixels) + output.loss + output.quantizer_loss).backward()
    literal["train.total_loss"].backward()
    for name, parameter in model.named_parameters():
        expected = parameters[name].grad
        expected = torch.zeros_like(parameter) if expected is None else expected
        extra = 2e-6 if name.endswith("k_proj.bias") else 0.0  # 0 in exact arithmetic, as softmax ignores a shift
        assert_grad_close(name, parameter.grad, expected, extra=extra)


@pytest.mark.parametrize("name", OPTIONS)
def test_model__every_option_equals_the_twin(name: str) -> None:
    _compare(small_config(**OPTIONS[name]))


@pytest.mark.parametrize("on_sphere", [True, False])
def test_identity_bottleneck__from_file_equals_the_twin(tmp_path: Path, on_sphere: bool) -> None:
    config = small_config(**IDENTITY, vision_config__quantizer_l2_norm=on_sphere)
    _model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not any("quant_embed" in name for name in state)
    model, pixels = QLIPModel.from_pretrained(tmp_path), torch.randn(2, 3, 16, 16)
    assert model.config.vision_config == QLIPConfig.from_dict(config).vision_config
    literal = literal_forward(state, config, pixels)
    assert torch.equal(model.encode(pixels), literal["group_indices"])
    with torch.no_grad():
        assert_close("decode", model.decode(literal["group_indices"]), literal["reconstructions"])


@pytest.mark.parametrize("name", ["as published", "text swiglu and sub-LN", "argmax pooling"])
def test_model__padded_texts_equal_the_twin(name: str) -> None:
    _compare(small_config(**OPTIONS[name]), padded=True, images=5)


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    flag = st.booleans()
    changes: dict[str, Any] = {}
    for tower in ("text_config", "vision_config", "decoder_config"):
        for option in ("q_bias", "k_bias", "v_bias", "subln", "swiglu"):
            changes[f"{tower}__{option}"] = draw(flag)
        changes[f"{tower}__num_hidden_layers"] = draw(st.integers(1, 2))
        changes[f"{tower}__layer_norm_eps"] = draw(st.sampled_from([1e-6, 1e-5, 1e-4]))
    heads = draw(st.integers(1, 3))
    width = 4 * heads * draw(st.integers(2, 4))
    for option, value in (("hidden_size", width), ("num_attention_heads", heads), ("rope", draw(flag))):
        changes[f"grid__{option}"] = value
    patch = draw(st.sampled_from([2, 3, 5]))
    changes |= {"grid__patch_size": patch, "grid__image_size": patch * draw(st.integers(1, 4))}
    mlp = draw(flag)
    bits = draw(st.sampled_from([1, 6, 12, 20])) if mlp else width
    group_size = draw(st.sampled_from([size for size in range(1, 11) if bits % size == 0]))
    changes["vision_config__quantizer_embed_type"] = "mlp" if mlp else "identity"
    on_sphere, scaled = draw(flag), draw(flag)
    # latents of length sqrt(L) and codes without a scale: at 100 the logits exceed the digits of a float32
    temperatures = [1.0, 10.0, 100.0] if on_sphere or scaled else [1.0, 10.0]
    changes["vision_config__quantizer_l2_norm"] = on_sphere
    changes["vision_config__quantizer_cfg"] = {
        "embed_dim": bits,
        "group_size": group_size,
        "input_format": "blc",
        "l2_norm": scaled,
        "beta": draw(st.sampled_from([0.0, 0.5])),
        "inv_temperature": draw(st.sampled_from(temperatures)),
        "persample_entropy_compute": draw(st.sampled_from(["group", "analytical"])),
    }
    changes["text_config__eos_token_id"] = draw(st.sampled_from([2, 49]))
    changes["vision_projection_bias"], changes["text_projection_bias"] = draw(flag), draw(flag)
    return small_config(**changes)


@given(_configs(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_model__random_configurations_equal_the_twin(config: dict[str, Any], padded: bool, seed: int) -> None:
    _compare(config, images=2, padded=padded, seed=seed)


def test_model__padding_before_the_text_equals_the_twin() -> None:
    config = small_config()
    model = _model(config).eval()
    ids = torch.randint(3, 48, (2, 10))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 1, 0, 0]])
    literal = literal_forward(model.state_dict(), config, None, ids, mask)
    output = model(input_ids=ids, attention_mask=mask)
    actual, expected = output.text_model_output.last_hidden_state.detach(), literal["text.last_hidden_state"]
    assert_close("text.last_hidden_state", actual, expected)


def test_model__images_alone_and_text_alone() -> None:
    config = small_config()
    model = _model(config).eval()
    pixels, (ids, _) = torch.randn(2, 3, 16, 16), _texts(config, 3)
    both = model(pixels, ids)
    images, texts = model(pixel_values=pixels), model(input_ids=ids)
    assert torch.equal(images.image_embeds, both.image_embeds)
    assert torch.equal(texts.text_embeds, both.text_embeds)
    assert torch.equal(model.embed_images(pixels.double()), both.image_embeds)
    assert torch.equal(model.embed_texts(ids), both.text_embeds)
    assert images.text_embeds is images.logits_per_image is images.loss is None
    assert texts.image_embeds is texts.reconstructions is texts.indices is None
    assert both.logits_per_image.shape == (2, 3)


def test_get_patch_features__are_the_encoders_hidden_states() -> None:
    config = small_config(vision_config__num_hidden_layers=3)
    model = _model(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    literal = literal_forward(model.state_dict(), config, pixels)
    for layer, stored in ((-2, 2), (-1, 3), (0, 0), (3, 3), (-4, 0)):
        features = model.get_patch_features(pixels, layer=layer)
        assert_close(f"layer {layer}", features.detach(), literal[f"vision.hidden_states.{stored}"][:, 1:])
    assert torch.equal(model.get_patch_features(pixels), model.get_patch_features(pixels, layer=-2))


def test_activation_checkpointing__gradients_are_equal() -> None:
    gradients = []
    for enabled in (False, True):
        model = _model(small_config())
        model.set_activation_checkpointing(enabled)
        output = model(torch.ones(2, 3, 16, 16))
        (output.reconstructions.square().mean() + output.quantizer_loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_model__eval_is_deterministic() -> None:
    model = _model(small_config()).eval()
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode(pixels), model.encode(pixels))
    indices = model.encode(pixels)
    assert torch.equal(model.decode(indices), model.decode(indices))
    assert torch.equal(indices, model(pixels).indices)
