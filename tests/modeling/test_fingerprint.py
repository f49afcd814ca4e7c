"""The two fingerprints change with exactly what they name, and survive files and casts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip import QLIPConfig, QLIPModel
from tests.modeling.helpers import small_config

CODES = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "vision_model.encoder.layers.1.mlp.ffn_ln.bias",
    "vision_model.quant_embed.c_fc.weight",
    "vision_model.quant_embed.c_proj.bias",
)
DECODER = (
    "vision_model.quant_embed_post.c_fc.weight",
    "vision_model.quant_embed_post.c_proj.bias",
    "vision_decoder.position_embeddings",
    "vision_decoder.encoder.layers.0.self_attn.v_proj.bias",
    "vision_decoder.norm.weight",
    "vision_decoder.ffn.0.weight",
    "vision_decoder.conv_out.bias",
)


def _model(**changes: object) -> QLIPModel:
    torch.manual_seed(0)
    return QLIPModel(QLIPConfig.from_dict(small_config(**changes))).eval()


def _both(model: QLIPModel) -> tuple[str, str]:
    return model.code_fingerprint, model.decoder_fingerprint


def test_fingerprints__sha_256_and_equal_for_equal_models() -> None:
    first, second = _both(_model()), _both(_model())
    assert first == second
    assert first[0] != first[1]
    for fingerprint in first:
        assert len(fingerprint) == 64
        assert int(fingerprint, 16) >= 0


def test_fingerprints__each_tensor_belongs_to_one_side_or_none() -> None:
    """Every parameter of the model, one at a time."""
    model = _model()
    before = _both(model)
    for name, parameter in model.named_parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 0.5
        codes_changed, decoder_changed = (now != then for now, then in zip(_both(model), before, strict=True))
        is_decoder = name.startswith(("vision_model.quant_embed_post.", "vision_decoder."))
        is_head = name.startswith(("text_", "visual_projection", "logit_scale", "vision_model.post_layernorm"))
        assert decoder_changed == is_decoder, name
        assert codes_changed == (not is_decoder and not is_head), name
        with torch.no_grad():
            parameter.copy_(saved)
    assert _both(model) == before


@pytest.mark.parametrize("name", [*CODES, *DECODER])
def test_fingerprints__tensor_changes_its_side(name: str) -> None:
    model = _model()
    before = _both(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-3
    now = _both(model)
    assert (now[0] != before[0], now[1] != before[1]) == (name in CODES, name in DECODER)


@pytest.mark.parametrize(
    ("changes", "codes", "decoder"),
    [
        ({"vision_config__layer_norm_eps": 1e-5}, True, False),
        ({"decoder_config__layer_norm_eps": 1e-5}, False, True),
        ({"vision_config__num_attention_heads": 4}, True, False),
        ({"decoder_config__num_attention_heads": 4}, False, True),
        ({"vision_config__quantizer_cfg__l2_norm": False}, False, True),
        ({"text_config__num_attention_heads": 2}, False, False),
        ({"vision_config__quantizer_cfg__inv_temperature": 10.0}, False, False),
        ({"vision_config__quantizer_cfg__beta": 1.0}, False, False),
        ({"vision_config__quantizer_cfg__group_size": 6}, False, False),
    ],
)
def test_fingerprints__settings_that_change_codes_or_pixels_count(
    changes: dict[str, object], codes: bool, decoder: bool
) -> None:
    before, now = _both(_model()), _both(_model(**changes))
    assert (now[0] != before[0], now[1] != before[1]) == (codes, decoder)


def test_fingerprints__survive_files_and_casts(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "float32")
    assert _both(QLIPModel.from_pretrained(tmp_path / "float32")) == _both(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert _both(QLIPModel.from_pretrained(tmp_path / "float32", dtype=dtype)) == _both(model)


def test_fingerprints__half_precision_file_has_its_own_after_any_cast(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = _both(QLIPModel.from_pretrained(tmp_path))
    assert loaded != _both(model)
    assert _both(QLIPModel.from_pretrained(tmp_path, dtype=torch.float16)) == loaded
    assert _both(QLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)) == loaded


def test_fingerprints__training_step_changes_them() -> None:
    model = _model().train()
    before = _both(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(torch.randn(2, 3, 16, 16))
    (output.reconstructions.square().mean() + output.quantizer_loss).backward()
    optimizer.step()
    now = _both(model)
    assert now[0] != before[0]
    assert now[1] != before[1]


def test_fingerprints__load_state_dict_changes_them() -> None:
    model, other = _model(), _model()
    with torch.no_grad():
        other.vision_decoder.conv_out.bias.add_(1)
    before = _both(model)
    model.load_state_dict(other.state_dict())
    assert _both(model) == _both(other) != before
