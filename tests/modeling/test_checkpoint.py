"""Checkpoint folders: what loads, what is refused and how, and that what is saved comes back bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip import QLIPError, QLIPModel
from qlip.modeling.checkpoint import Files
from tests.modeling.helpers import FIXTURE, FIXTURES, MODEL_FIXTURES, assert_one_line, load_fixture


def _rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


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
def test_load__any_subset_of_rope_buffers(checkpoint: Path, present: tuple[str, ...]) -> None:
    tables = _rope_keys()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tables:
            tensors.pop(name, None)
        tensors.update({name: torch.full_like(tables[name], 99.0) for name in present})  # never read

    _rewrite(checkpoint, change)
    stored = load_fixture(FIXTURE.name)
    indices = QLIPModel.from_pretrained(checkpoint).encode(stored.inputs["pixel_values"])
    assert torch.equal(indices, stored.outputs["group_indices"])


def test_rope_tables__neither_saved_nor_parameters(tmp_path: Path) -> None:
    QLIPModel.from_pretrained(FIXTURE).save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "rope" in name]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vision_model.quant_embed.c_fc.bias", "logit_scale", "vision_decoder.position_embeddings"]
)
def test_load__missing_key_is_named(checkpoint: Path, name: str) -> None:
    _rewrite(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, name, "missing", str(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.quant_embed.c_fc.wieght",
        "vision_model.encoder.layers.0.self_attn.k_proj.bias",
        "vision_model.rope.freqs_tan",
    ],
)
def test_load__unexpected_key_is_named(checkpoint: Path, name: str) -> None:
    _rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, name, "unexpected")


def test_load__misspelt_key_is_named_with_the_right_one(checkpoint: Path) -> None:
    right, wrong = "vision_model.quant_embed.c_fc.weight", "vision_model.quant_embed.c_fc.wieght"
    _rewrite(checkpoint, lambda tensors: tensors.update({wrong: tensors.pop(right)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, wrong, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_load__weights_that_are_not_finite_are_refused(checkpoint: Path, bad: float) -> None:
    """One value is enough: it would encode, embed and classify with no word."""
    name = "vision_model.encoder.layers.0.layer_norm2.weight"
    _rewrite(checkpoint, lambda tensors: tensors[name].__setitem__(-1, bad))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, "model.safetensors", name, "hold", "broken")


def test_load__integers_are_refused(checkpoint: Path) -> None:
    _rewrite(checkpoint, lambda tensors: tensors.update(logit_scale=torch.tensor(3, dtype=torch.int8)))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, "logit_scale", "torch.int8")


def test_load__what_other_software_adds_is_left_out(checkpoint: Path) -> None:
    """CLIP's old buffer of positions, and the prefixes of DDP and torch.compile."""
    expected = QLIPModel.from_pretrained(checkpoint)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            new = name.replace("encoder.layers.1.", "encoder.layers.1._orig_mod.")
            tensors[f"module.{new}"] = tensors.pop(name)
        tensors["module.text_model.embeddings.position_ids"] = torch.arange(16)[None]

    _rewrite(checkpoint, rename)
    assert _same_weights(QLIPModel.from_pretrained(checkpoint), expected)


def test_load__wrong_shape_is_named(checkpoint: Path) -> None:
    name = "visual_projection.weight"
    _rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(24, 47)}))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, name, "(24, 47)", "(24, 48)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_load__pickle_is_refused_and_never_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, name, "pickle", "safetensors")
    assert not trap.exists()


def test_load__broken_or_absent_file_is_one_line(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:4], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint)
        assert_one_line(error, "model.safetensors")
    weights.write_bytes(whole)
    for broken in (b"{", b"[]", b"\xff\xfe"):
        (checkpoint / "config.json").write_bytes(broken)
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint)
        assert_one_line(error, "config.json")
    (checkpoint / "config.json").unlink()
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(checkpoint)
    assert_one_line(error, "config.json")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "QLIP-B-16-265", "/no/such"])
def test_files__unknown_model_is_one_line(name: str) -> None:
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained(name)
    assert_one_line(error, name)


def test_files__offline_and_not_cached_is_one_line(tmp_path: Path) -> None:
    for name in ("somebody/some-model", "QLIP-B-16-256"):
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
        assert_one_line(error, name, "cache")


def _cache(folder: Path, repo_id: str) -> None:
    """The Hub's cache as a download leaves it, holding a fixture."""
    repo = folder / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURE / name, snapshot / name)


def test_files__cached_hub_model_loads_offline_by_id_or_published_name(tmp_path: Path) -> None:
    expected = QLIPModel.from_pretrained(FIXTURE)
    _cache(tmp_path, "somebody/some-model")
    _cache(tmp_path, "nvidia/QLIP-B-16-256")
    for name in ("somebody/some-model", "QLIP-B-16-256", "nvidia/QLIP-B-16-256"):
        model = QLIPModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
        assert _same_weights(model, expected)
    with pytest.raises(QLIPError) as error:
        QLIPModel.from_pretrained("somebody/some-model", revision="other", cache_dir=tmp_path, local_files_only=True)
    assert_one_line(error, "somebody/some-model")


# --- what is saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_FIXTURES)
def test_save__round_trip_is_bit_for_bit(tmp_path: Path, name: str) -> None:
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


def test_load__eval_mode_and_trainable(checkpoint: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_and_save__dtypes(checkpoint: Path, tmp_path: Path) -> None:
    model = QLIPModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pixels = load_fixture(FIXTURE.name).inputs["pixel_values"].bfloat16()
    assert torch.isfinite(model.decode(model.encode(pixels))).all()

    half = tmp_path / "half"
    QLIPModel.from_pretrained(checkpoint).save_pretrained(half, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float16}
    assert QLIPModel.from_pretrained(half).dtype == torch.float32


def test_load__names_of_types_and_devices(checkpoint: Path) -> None:
    """As transformers takes them."""
    for given in (
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16, "device_map": "auto"},
        {"torch_dtype": "bfloat16", "device_map": {"": "cpu"}},
    ):
        assert QLIPModel.from_pretrained(checkpoint, **given).dtype == torch.bfloat16  # type: ignore[arg-type]
    QLIPModel.from_pretrained(checkpoint, dtype="float16").save_pretrained(checkpoint)
    assert QLIPModel.from_pretrained(checkpoint, torch_dtype="auto").dtype == torch.float16
    assert QLIPModel.from_pretrained(checkpoint).dtype == torch.float32
    for wrong in (
        {"dtype": "int8"},
        {"dtype": "float32", "torch_dtype": "float16"},
        {"device": "tpu"},
        {"device_map": {"vision_model": "cpu", "text_model": "cuda"}},
    ):
        with pytest.raises(QLIPError) as error:
            QLIPModel.from_pretrained(checkpoint, **wrong)  # type: ignore[arg-type]
        assert_one_line(error)


def test_model__pixels_of_any_floating_type(checkpoint: Path) -> None:
    """They are cast to the type of the weights."""
    pixels = torch.rand(2, 3, 32, 32)
    single = QLIPModel.from_pretrained(checkpoint)
    half = QLIPModel.from_pretrained(checkpoint, dtype="bfloat16")
    assert torch.equal(single.encode(pixels.double()), single.encode(pixels))
    with torch.no_grad():
        assert half(pixels).reconstructions.dtype == torch.bfloat16
    assert torch.equal(half.encode(pixels), half.encode(pixels.bfloat16()))


def test_files__digest_is_of_configuration_and_weights(tmp_path: Path) -> None:
    for name in ("config.json", "b.safetensors", "a.safetensors", "other.txt"):
        (tmp_path / name).write_text(name)
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    digests = [sha256(name.encode()).hexdigest() for name in ("config.json", "a.safetensors", "b.safetensors")]
    assert Files(tmp_path).digest() == sha256("".join(digests).encode()).hexdigest()


def test_load__shards(checkpoint: Path) -> None:
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
    assert_one_line(error, missing.name)
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
        assert_one_line(error, "index.json")
