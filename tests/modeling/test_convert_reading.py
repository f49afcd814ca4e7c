"""Weights files with something wrong in them: each is refused in one line that names the file and the remedy."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlip import QLIPConfig, QLIPError
from qlip.modeling.convert import convert
from tests.modeling.convert_sources import SIZES, config_of, eva_rope, make

State = dict[str, Tensor]


class Evil:
    """Makes a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def state() -> State:
    return make("eva02_clip_base")


@pytest.fixture
def config() -> QLIPConfig:
    return QLIPConfig.from_dict(config_of())


def refused(path: Path | str, said: str, **arguments: Any) -> None:
    arguments = {"vision": path, "config": QLIPConfig.from_dict(config_of())} | arguments
    with pytest.raises(QLIPError, match=said) as error:
        convert(**arguments)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def written(state: State, path: Path) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    return path


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "no/such/folder", "QLIP-B-16"])
def test_a_missing_file(name: str) -> None:
    refused(name, "no such file; give a .safetensors or .pt file, or a QLIP checkpoint folder")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, state: State, suffix: str, share: float) -> None:
    path = tmp_path / f"clip.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        written(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "fetch it again")


def test_a_spoilt_file_never_shows_a_traceback(tmp_path: Path) -> None:
    """Both formats of torch.save, with bytes changed where the structure is."""
    small = {"logit_scale": torch.zeros(()), "visual.cls_token": torch.zeros(2)}
    dice = random.Random(0)
    for zipped in (True, False):
        torch.save({"state_dict": small}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "whole.pt").read_bytes()
        for number in range(150):
            data = bytearray(whole)
            for _ in range(dice.randint(1, 8)):
                data[dice.randrange(min(len(data), 600))] = dice.randrange(256)
            path = tmp_path / f"spoilt-{number}.pt"
            path.write_bytes(data)
            with pytest.raises(QLIPError) as error:  # even a whole one holds no tower
                convert(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, state: State, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": state, "hook": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds Python objects \(\w+\.mkdir\), which are never loaded; .* save the state dict alone")
    assert not (tmp_path / "ran").exists()


def test_objects_and_programs_are_named(tmp_path: Path, state: State) -> None:
    path = tmp_path / "training.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, path)
    refused(path, r"holds Python objects \(argparse\.Namespace\)")
    program = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), program)
    refused(program, r"a TorchScript program, which is never run; save its state_dict\(\) as safetensors")


def test_files_without_a_state_dict(tmp_path: Path) -> None:
    for content, said in (([1, 2], "holds a list, not a state dict"), ({"model": {}}, "holds no tensors")):
        path = tmp_path / "other.pt"
        torch.save(content, path)
        refused(path, said)
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "a folder without config.json is no QLIP checkpoint; name the weights file in it")


# --- layouts ------------------------------------------------------------------------------------------------


def test_an_unknown_layout_names_what_was_expected(tmp_path: Path, state: State) -> None:
    resnet = {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    path = written(resnet, tmp_path / "resnet.safetensors")
    expected = (
        r"no image tower .* expected EVA's names \(cls_token, .*OpenCLIP's \(conv1\.weight.*it holds 'conv1\.weight'"
    )
    refused(path, expected)
    towers = {key: value for key, value in state.items() if key.startswith("visual.")}
    vision = written(towers, tmp_path / "vision.safetensors")
    refused(vision, r"no text tower .* expected CLIP's names \(token_embedding\.weight", vision=None, text=vision)


def test_a_qlips_weights_without_their_folder(tmp_path: Path) -> None:
    names = {
        "vision_model.embeddings.class_embedding": (4,),
        "vision_model.embeddings.patch_embedding.weight": (4, 3, 2, 2),
    }
    path = written({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    refused(path, "give a QLIP checkpoint's folder|name a QLIP checkpoint's folder")


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("visual.blocks.1.gamma_1", (32,), "a scale behind each layer has no place"),
        ("visual.rel_pos_bias.relative_position_bias_table", (9, 2), "a relative position bias has no place"),
        ("visual.blocks.0.adapter.weight", (4, 4), "'visual.blocks.0.adapter.weight' is not a name of EVA image tower"),
        (
            "unheard_of",
            (4,),
            "'unheard_of' is not a name of .*, and what it does would be lost; --approximate drops it",
        ),
    ],
)
def test_keys_without_a_place_are_refused_or_dropped_in_the_open(
    tmp_path: Path, state: State, config: QLIPConfig, key: str, shape: tuple[int, ...], said: str
) -> None:
    path = written(state | {key: torch.ones(shape)}, tmp_path / "clip.safetensors")
    refused(path, said)
    made = convert(path, config=config, approximate=True)
    (row,) = (row for row in made.report.rows if key in row.source_keys)
    assert row.status == "dropped" and row.how


def test_post_norm_blocks_are_known_by_their_width(tmp_path: Path) -> None:
    giant = make("eva01_clip_g", width=1792, heads=16, hidden=4, depth=1, grid=1)
    path = written(giant, tmp_path / "e.safetensors")
    refused(path, "blocks that normalise behind attention and MLP .* have no place in a QLIP")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.pop("visual.blocks.1.norm1.weight"),
            "not a whole EVA image tower .*: it holds no 'visual.blocks.1.norm1.weight'; fetch",
        ),
        (lambda s: s.pop("visual.blocks.0.attn.k_proj.weight"), "holds no 'visual.blocks.0.attn.k_proj.weight'"),
        (lambda s: s.pop("visual.blocks.0.mlp.w1.weight"), r"holds no 'visual\.blocks\.0\.mlp\.\w+\.weight'"),
        (lambda s: s.pop("visual.blocks.2.mlp.w3.bias"), "holds no 'visual.blocks.2.mlp.w3.bias'"),
        (lambda s: s.update({"visual.norm.weight": torch.ones(31)}), r"'visual.norm.weight' gives .* of shape \(31,\)"),
        (lambda s: s.update({"visual.pos_embed": torch.ones(1, 16, 32)}), "16 position embeddings are not .CLS. and a"),
        (
            lambda s: s.update({"visual.pos_embed": torch.ones(17)}),
            r"'visual.pos_embed' has shape \(17,\), expected a vec",
        ),
        (lambda s: s.update({"visual.blocks.0.mlp.w1.weight": torch.ones(4)}), "has 1 dimensions, expected 2"),
        (lambda s: s.update({"visual.blocks.1.mlp.w1.weight": torch.ones(4)}), r"of shape \(4,\), the config makes it"),
        (
            lambda s: s.update({"visual.patch_embed.proj.weight": torch.ones(32, 3, 7, 6)}),
            "expected .width, channels, pat",
        ),
        (
            lambda s: s.update({"visual.head.weight": torch.ones(16)}),
            "'visual.head.weight' has 1 dimensions, expected 2",
        ),
        (lambda s: s.update({"visual.norm.bias": torch.ones(32, dtype=torch.int8)}), "torch.int8, not floating point"),
        (lambda s: s.update({"visual.blocks.0.attn.q_proj.bias": torch.ones(32)}), "are the same thing; leave one out"),
        (
            lambda s: s.update({"text_projection": torch.ones(24)}),
            "'text_projection' has shape .24,., expected a matrix",
        ),
        (
            lambda s: s.update({"transformer.resblocks.0.attn.in_proj_bias": torch.ones(71)}),
            r"in_proj_bias' has shape \(71,\), expected 3 equal parts",
        ),
        (lambda s: s.update({"logit_scale": torch.ones(2)}), "'logit_scale' has shape .2,., expected one number"),
    ],
)
def test_files_that_are_not_whole_or_of_another_shape(
    tmp_path: Path, state: State, change: Callable[[State], object], said: str
) -> None:
    spoilt = dict(state)
    change(spoilt)
    path = written(spoilt, tmp_path / "clip.safetensors")
    refused(path, said, text=path)


# --- rotary tables ------------------------------------------------------------------------------------------


def test_rotary_tables_of_another_function_are_reported(tmp_path: Path, state: State, config: QLIPConfig) -> None:
    """A tower trained at grid 4 without stretching its coordinates to pre-training's 16."""
    unstretched = dict(zip(("cos", "sin"), eva_rope(SIZES["grid"], 16, span=SIZES["grid"]), strict=True))
    other = {key: unstretched[key[-3:]] if "freqs_" in key else value for key, value in state.items()}
    notes = convert(written(other, tmp_path / "a.safetensors"), config=config).report.notes
    assert any("rotary tables differ from a QLIP's by up to" in note for note in notes)
    none = {key: value for key, value in state.items() if "freqs_" not in key}
    notes = convert(written(none, tmp_path / "b.safetensors"), config=config).report.notes
    assert any("no rotary tables in the file; taken to be EVA-02's" in note for note in notes)
    assert any("no file says the number of heads; 2 taken from the config" in note for note in notes)
    odd = {key: torch.ones(3, 5) if "freqs_" in key else value for key, value in state.items()}
    notes = convert(written(odd, tmp_path / "c.safetensors"), config=config).report.notes
    assert any("rotary tables are not of its grid and width" in note for note in notes)
