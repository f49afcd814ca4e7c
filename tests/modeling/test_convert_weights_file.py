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
def test_read__missing_file(name: str) -> None:
    refused(name, "no such file; give a .safetensors or .pt file, or a QLIP checkpoint folder")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_read__truncated_file(tmp_path: Path, state: State, suffix: str, share: float) -> None:
    path = tmp_path / f"clip.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        written(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "fetch it again")


def test_read__corrupted_file_raises_one_line(tmp_path: Path) -> None:
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
def test_read__pickled_code_is_not_run(tmp_path: Path, state: State, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": state, "hook": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds Python objects \(\w+\.mkdir\), which are never loaded; .* save the state dict alone")
    assert not (tmp_path / "ran").exists()


def test_read__python_objects_are_named_and_refused(tmp_path: Path, state: State) -> None:
    path = tmp_path / "training.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, path)
    refused(path, r"holds Python objects \(argparse\.Namespace\)")
    program = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), program)
    refused(program, r"a TorchScript program, which is never run; save its state_dict\(\) as safetensors")


def test_read__file_without_a_state_dict(tmp_path: Path) -> None:
    for content, said in (([1, 2], "holds a list, not a state dict"), ({"model": {}}, "holds no tensors")):
        path = tmp_path / "other.pt"
        torch.save(content, path)
        refused(path, said)
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "a folder without config.json is no QLIP checkpoint; name the weights file in it")


# --- layouts ------------------------------------------------------------------------------------------------


def test_take__unknown_format_names_the_expected_ones(tmp_path: Path, state: State) -> None:
    resnet = {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    path = written(resnet, tmp_path / "resnet.safetensors")
    expected = (
        r"holds no known image tower; expected EVA's names \(cls_token, .*under 'visual\.'; found 'conv1\.weight'"
    )
    refused(path, expected)
    towers = {key: value for key, value in state.items() if key.startswith("visual.")}
    vision = written(towers, tmp_path / "vision.safetensors")
    refused(vision, r"no known text tower; expected CLIP's names \(token_embedding\.weight", vision=None, text=vision)


def test_take__qlip_weights_without_their_folder(tmp_path: Path) -> None:
    names = {
        "vision_model.embeddings.class_embedding": (4,),
        "vision_model.embeddings.patch_embedding.weight": (4, 3, 2, 2),
    }
    path = written({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    refused(path, "give a QLIP checkpoint's folder")


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("visual.blocks.1.gamma_1", (32,), "a QLIP has no scale after each layer"),
        ("visual.rel_pos_bias.relative_position_bias_table", (9, 2), "a QLIP has no relative position bias"),
        ("visual.blocks.0.adapter.weight", (4, 4), "'visual.blocks.0.adapter.weight' is not a name of EVA image tower"),
        (
            "unheard_of",
            (4,),
            "'unheard_of' is not a name of .*, and its effect would be lost; remove the tensor from the file",
        ),
    ],
)
def test_take__keys_without_a_counterpart_are_refused(
    tmp_path: Path, state: State, key: str, shape: tuple[int, ...], said: str
) -> None:
    path = written(state | {key: torch.ones(shape)}, tmp_path / "clip.safetensors")
    refused(path, said)


def test_take__post_norm_blocks_are_refused(tmp_path: Path) -> None:
    giant = make("eva01_clip_g", width=1792, heads=16, hidden=4, depth=1, grid=1)
    path = written(giant, tmp_path / "e.safetensors")
    refused(path, "a QLIP's blocks do not normalise after attention and MLP, as EVA-02-CLIP-E's do")


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
        (
            lambda s: s.update({"visual.blocks.0.attn.q_proj.bias": torch.ones(32)}),
            "are the same parameter; leave one out",
        ),
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
def test_take__incomplete_or_misshapen_files_are_refused(
    tmp_path: Path, state: State, change: Callable[[State], object], said: str
) -> None:
    spoilt = dict(state)
    change(spoilt)
    path = written(spoilt, tmp_path / "clip.safetensors")
    refused(path, said, text=path)


# --- rotary tables ------------------------------------------------------------------------------------------


def test_take__other_rotary_tables_are_reported(tmp_path: Path, state: State, config: QLIPConfig) -> None:
    """A tower trained at grid 4 without stretching its coordinates to pre-training's 16."""
    unstretched = dict(zip(("cos", "sin"), eva_rope(SIZES["grid"], 16, span=SIZES["grid"]), strict=True))
    other = {key: unstretched[key[-3:]] if "freqs_" in key else value for key, value in state.items()}
    notes = convert(written(other, tmp_path / "a.safetensors"), config=config).report.notes
    assert any("rotary tables differ from a QLIP's by up to" in note for note in notes)
    none = {key: value for key, value in state.items() if "freqs_" not in key}
    notes = convert(written(none, tmp_path / "b.safetensors"), config=config).report.notes
    assert any("the file holds no rotary tables; EVA-02's are assumed" in note for note in notes)
    assert any("the file does not say the number of heads; 2 taken from the config" in note for note in notes)
    odd = {key: torch.ones(3, 5) if "freqs_" in key else value for key, value in state.items()}
    notes = convert(written(odd, tmp_path / "c.safetensors"), config=config).report.notes
    assert any("rotary tables do not fit its grid and width" in note for note in notes)
