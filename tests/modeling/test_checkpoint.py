"""Checkpoint folders: what loads, what is refused and how, and that what is saved comes back bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip import QLIPConfig, QLIPError, QLIPModel, assets
from tests.modeling.helpers import FIXTURES, MODEL_FIXTURES, load_fixture, small_config

FIXTURE = FIXTURES / "a28_swiglu_subln_rope_28bit"
PUBLISHED = ["QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a fixture's checkpoint, to be spoilt."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURE / name, folder / name)
    return folder


def _rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _rewrite_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _assert_one_line(error: pytest.ExceptionInfo[QLIPError], *wanted: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in wanted:
        assert text in message


def _same_weights(one: QLIPModel, other: QLIPModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- rope buffers -------------------------------------------------------------------------------------------


def _rope_keys() -> dict[str, Tensor]:
    """Every name under which the shared rope tables are found in checkpoints."""
    stored = load_file(FIXTURE / "model.safetensors")
    keys = {}
    for tower in ("vision_model", "vision_decoder"):
        for part in ("cos", "sin"):
            table = stored[f"{tower}.rope.freqs_{part}"]
            keys[f"{tower}.rope.freqs_{part}"] = table
            for layer in range(2):
                keys[f"{tower}.encoder.layers.{layer}.self_attn.rope.freqs_{part}"] = table
    return keys


def _subsets() -> list[tuple[str, ...]]:
    names = sorted(_rope_keys())
    some = list(combinations(names, 2))[::9]
    return [(), *((name,) for name in names), *some, tuple(names)]


@pytest.mark.parametrize("present", _subsets(), ids=lambda names: f"{len(names)}")
def test_any_subset_of_rope_buffers_loads(checkpoint: Path, present: tuple[str, ...]) -> None:
    tables = _rope_keys()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tables:
            tensors.pop(name, None)
        tensors.update({name: torch.full_like(tables[name], 99.0) for name in present})  # never read

    _rewrite(checkpoint, change)
    stored = load_fixture(FIXTURE.name)
    indices = QLIPModel.from_pretrained(checkpoint).encode(stored.inputs["pixel_values"])
    assert torch.equal(indices, stored.outputs["group_indices"])


def test_rope_tables_are_not_saved_and_not_parameters(tmp_path: Path) -> None:
    QLIPModel.from_pretrained(FIXTURE).save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "rope" in name]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vision_model.quant_embed.c_fc.bias", "logit_scale", "vision_decoder.position_embeddings"]
)
def test_a_missing_key_is_named(checkpoint: Path, name: str) -> None:
    _rewrite(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, name, "missing", str(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.quant_embed.c_fc.wieght",
        "text_model.embeddings.position_ids",
        "vision_model.encoder.layers.0.self_attn.k_proj.bias",
        "vision_model.rope.freqs_tan",
    ],
)
def test_an_unexpected_key_is_named(checkpoint: Path, name: str) -> None:
    _rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, name, "unexpected")


def test_a_key_spelt_wrong_is_named_with_the_right_one(checkpoint: Path) -> None:
    right, wrong = "vision_model.quant_embed.c_fc.weight", "vision_model.quant_embed.c_fc.wieght"
    _rewrite(checkpoint, lambda tensors: tensors.update({wrong: tensors.pop(right)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, wrong, right)


def test_another_shape_is_named(checkpoint: Path) -> None:
    name = "visual_projection.weight"
    _rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(24, 47)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, name, "(24, 47)", "(24, 48)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_pickle_is_refused_with_the_reason_and_never_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, name, "pickle", "safetensors")
    assert not trap.exists()


def test_a_broken_or_absent_file_is_one_line(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:4], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint)
        _assert_one_line(error, "model.safetensors")
    weights.write_bytes(whole)
    for broken in (b"{", b"[]", b"\xff\xfe"):
        (checkpoint / "config.json").write_bytes(broken)
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint)
        _assert_one_line(error, "config.json")
    (checkpoint / "config.json").unlink()
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, "config.json")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "QLIP-B-16-265", "/no/such"])
def test_no_such_model_is_one_line(name: str) -> None:
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(name)
    _assert_one_line(error, name)


def test_offline_and_not_cached_is_one_line(tmp_path: Path) -> None:
    for name in ("somebody/some-model", "QLIP-B-16-256"):
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
        _assert_one_line(error, name, "cache")


def _cache(folder: Path, repo_id: str) -> None:
    """The Hub's cache as a download leaves it, holding a fixture."""
    repo = folder / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURE / name, snapshot / name)


def test_a_cached_hub_model_loads_offline_by_id_and_published_ones_by_bare_name(tmp_path: Path) -> None:
    expected = QLIPModel.from_pretrained(FIXTURE)
    _cache(tmp_path, "somebody/some-model")
    _cache(tmp_path, "nvidia/QLIP-B-16-256")
    for name in ("somebody/some-model", "QLIP-B-16-256", "nvidia/QLIP-B-16-256"):
        model = QLIPModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
        assert _same_weights(model, expected)
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained("somebody/some-model", revision="other", cache_dir=tmp_path, local_files_only=True)
    _assert_one_line(error, "somebody/some-model")


# --- what is saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_FIXTURES)
def test_a_round_trip_is_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = QLIPModel.from_pretrained(FIXTURES / name)
    model.save_pretrained(tmp_path)
    again = QLIPModel.from_pretrained(tmp_path)
    assert _same_weights(model, again)
    assert again.config == model.config
    stored = load_file(FIXTURES / name / "model.safetensors")
    stored = {key: value for key, value in stored.items() if "rope" not in key}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)
    again.save_pretrained(tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_it_loads_in_eval_mode_and_can_be_trained(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dtypes(checkpoint: Path, tmp_path: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pixels = load_fixture(FIXTURE.name).inputs["pixel_values"].bfloat16()
    assert torch.isfinite(model.decode(model.encode(pixels))).all()

    half = tmp_path / "half"
    QLIPModel.from_pretrained(checkpoint).save_pretrained(half, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float16}
    assert QLIPModel.from_pretrained(half).dtype == torch.float32


def test_shards(checkpoint: Path) -> None:
    whole = QLIPModel.from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, checkpoint / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert _same_weights(QLIPModel.from_pretrained(checkpoint), whole)

    missing = checkpoint / "model-00002-of-00003.safetensors"
    missing.unlink()
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    _assert_one_line(error, missing.name)
    for wrong in (
        "{}",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
    ):
        index.write_text(wrong)
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint)
        _assert_one_line(error, "index.json")


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_FIXTURES)
def test_config_comes_back_as_it_was_written(name: str) -> None:
    """Only what differs from the defaults is written, and what nothing reads is written back."""
    stored = load_fixture(name).config
    written = QLIPConfig.from_dict(stored).to_json_dict()
    assert QLIPConfig.from_dict(written) == QLIPConfig.from_dict(stored)
    for tower in ("text_config", "vision_config", "decoder_config"):
        assert set(written[tower]) <= set(stored[tower])
    assert written["vision_config"] == {
        key: value for key, value in stored["vision_config"].items() if key in written["vision_config"]
    }
    assert written["decoder_config"]["quantizer_cfg"] == stored["decoder_config"]["quantizer_cfg"]
    assert written["text_config"]["projection_dim"] == stored["text_config"]["projection_dim"]


def test_the_full_config_fills_the_published_defaults() -> None:
    config = QLIPConfig.from_dict(
        {
            "vision_projection_bias": True,
            "text_projection_bias": False,
            "vision_config": {
                "quantizer": "bsq",
                "quantizer_embed_type": "mlp",
                "quantizer_cfg": {"input_format": "blc"},
            },
            "decoder_config": {},
        }
    )
    full = config.to_dict()
    assert (full["projection_dim"], full["logit_scale_init_value"]) == (512, 2.6592)
    text, vision = full["text_config"], full["vision_config"]
    quantizer = vision["quantizer_cfg"]
    assert (text["vocab_size"], text["hidden_size"], text["num_attention_heads"]) == (49408, 512, 8)
    assert (text["pad_token_id"], text["bos_token_id"], text["eos_token_id"]) == (1, 49406, 49407)
    assert (vision["hidden_size"], vision["image_size"], vision["patch_size"]) == (768, 224, 32)
    assert (vision["layer_norm_eps"], vision["subln"], vision["rope"]) == (1e-5, False, False)
    assert (vision["k_bias"], text["k_bias"], text["swiglu"]) == (True, True, False)
    assert (quantizer["embed_dim"], quantizer["group_size"], quantizer["inv_temperature"]) == (18, 9, 100)
    assert (quantizer["beta"], quantizer["gamma_0"], quantizer["gamma_1"]) == (0, 1, 1)
    assert quantizer["l2_norm"] is True


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ("vision_config", "swigluu", "swiglu"),
        ("text_config", "hidden_sise", "hidden_size"),
        ("", "projection_dimm", "projection_dim"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_right_name(place: str, key: str, nearest: str) -> None:
    config = small_config()
    (config[place] if place else config)[key] = 1
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(config)
    _assert_one_line(error, key, repr(nearest))


def test_an_unknown_key_of_the_quantizer_is_an_error() -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(small_config(vision_config__quantizer_cfg__groupsize=4))
    _assert_one_line(error, "groupsize", "'group_size'")


@pytest.mark.parametrize("key", ["vision_projection_bias", "text_projection_bias"])
def test_what_has_no_default_must_be_there(key: str) -> None:
    config = small_config()
    del config[key]
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(config)
    _assert_one_line(error, key)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"vision_config__quantizer_cfg__group_size": 5}, "does not divide"),
        ({"vision_config__hidden_size_post_q": 40}, "hidden_size"),
        ({"vision_config__quantizer_embed_type": "identity"}, "embed_dim 12 must equal hidden_size 32"),
        (
            {
                "vision_config__quantizer_embed_type": "identity",
                "vision_config__quantizer_cfg__embed_dim": 32,
                "vision_config__hidden_size_post_q": 24,
                "decoder_config__hidden_size": 24,
            },
            "hidden_size_post_q 24 must equal hidden_size 32",
        ),
        ({"vision_config__num_attention_heads": 5}, "num_attention_heads"),
        ({"grid__num_attention_heads": 16}, "multiple of 4"),
        ({"grid__patch_size": 3}, "patch_size"),
        ({"decoder_config__image_size": 32}, "grid"),
        ({"vision_config__hidden_size": "large"}, "large"),
        ({"vision_config__quantizer": "none"}, "bsq"),
        ({"vision_config__quantizer_cfg__persample_entropy_compute": "both"}, "both"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(small_config(**changes))
    _assert_one_line(error, wanted)


def test_keys_that_nothing_reads_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"]["post_layernorm"] = True
        config["text_config"]["rope"] = True
        config["decoder_config"]["num_channels"] = 3

    _rewrite_config(checkpoint, change)
    QLIPModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    before = json.loads((checkpoint / "config.json").read_text())
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    for tower, key in (
        ("vision_config", "post_layernorm"),
        ("vision_config", "projection_dim"),
        ("vision_config", "model_type"),
        ("text_config", "rope"),
        ("text_config", "projection_dim"),
        ("decoder_config", "num_channels"),
        ("decoder_config", "quantizer_cfg"),
        ("decoder_config", "quantizer"),
    ):
        assert after[tower][key] == before[tower][key], (tower, key)
    for key in ("architectures", "model_type", "transformers_version", "initializer_factor"):
        assert after[key] == before[key]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_by_name(name: str) -> None:
    config = QLIPConfig.named(name)
    stored = json.loads(assets.path("configs", f"{name}.json").read_text())
    assert QLIPConfig.from_dict(stored) == config
    with torch.device("meta"):
        model = QLIPModel(config)
    _, patch, size = name.removeprefix("QLIP-").split("-")
    assert (model.image_size, model.patch_size, model.num_bits) == (int(size), int(patch), 28)


def test_b16_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = QLIPModel(QLIPConfig.named("QLIP-B-16-256"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 239_434_013


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.named("QLIP-B-16-265")
    _assert_one_line(error, "QLIP-B-16-265", "QLIP-B-16-256")
