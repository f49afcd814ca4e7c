"""The benchmark of small UM3s: variants, tables, resumption, and a training of each kind."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from benchmarks import timed, um3, um3_tables
from benchmarks.um3_heads import HEADS, HeadedChat, HeadedUM3
from qlip.errors import QLIPError
from qlip.lm import CausalConfig
from qlip.lm.sampling import Sampling
from qlip.training.parallel.faults import CollectiveError
from qlip.um3 import UM3, UM3Config
from qlip.um3.batch import Row, stack
from qlip.um3.sequence import VISUAL, indices_of, whole_image
from qlip.um3.session import UM3Chat, UM3Settings

POINT = (2.0, 40, 1.0, 1.5, 300.0, 310.0, 2.5)
OPTIONS = argparse.Namespace(cpu_seconds=0.2, scenes=2, per_kind=2, documents=1, rate=32.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))


def training(part: str, variant: str, seed: int = 0, right: int = 1, bits: float = 2.5) -> dict[str, Any]:
    values = [right] * 14
    return {
        "kind": "training",
        "part": part,
        "variant": variant,
        "seed": seed,
        "parameters": 5_700_000,
        "curve": [[1.0, 20, *POINT[2:6], bits + 1.0], [*POINT[:6], bits]],
        "text_ids": 4_000_000,
        "captions": {"right": values, "shuffled": [0] * 14, "blind": [0] * 14},
        "answers": {"right": values, "shuffled": [0] * 14, "blind": [0] * 14},
        "drawings": {"right": values, "blind": [0] * 14},
        "drawing_controls": {"other_caption": 1.0, "contradicted": 2.0},
        "text": {"sotu:test": bits},
    }


def test_recipe_of__a_variant_changes_its_own_keys_alone() -> None:
    recipe = timed.load("um3/nano")
    before = json.dumps(recipe)
    found = um3.variants("calmdown", recipe, 8.0)
    assert list(found) == ["calm-down", "constant 0.3", "constant 1", "text alone"]
    values = um3.recipe_of(recipe, found["text alone"], 3)
    assert values["data"]["mixture"] == {
        "text": [1, 1],
        "image_to_text": 0,
        "text_to_image": 0,
        "calm_down_steps": 500,
    }
    assert values["seed"] == 3 and values["threads"] == 1 and "validation" not in values
    assert values["data"]["num_workers"] == 0 and values["schedule"]["floor"] == 1.0
    assert json.dumps(recipe) == before
    stable = um3.variants("stability", recipe, 8.0)
    weak = um3.recipe_of(recipe, stable["neither"], 0)
    assert not weak["model"]["qk_norm"] and weak["losses"] == {
        "visual_weight": 0.25,
        "caption_weight": 4.0,
        "z_loss": 0.0,
    }
    assert weak["optimizer"]["lr"] == pytest.approx(8 * 3e-3) and weak["optimizer"]["name"] == "muon"
    assert um3.recipe_of(recipe, um3.variants("softmax", recipe, 1)["joint"], 0)["model"]["softmax"] == "joint"


def test_recipe_of__every_variant_is_a_recipe_of_the_task() -> None:
    from qlip.training.recipe import check_recipe

    recipe = timed.load("um3/debug")
    for part in um3.PARTS:
        for name, changes in um3.variants(part, recipe, 8.0).items():
            if name not in (um3.TALKER, um3.DRAWER, *HEADS):
                check_recipe(um3.recipe_of(recipe, changes, 0), name)


def test_text_ids__are_those_of_the_mixture() -> None:
    values = um3.recipe_of(timed.load("um3/debug"), {"data": {"mixture": {"text": [2, 2], "calm_down_steps": 1}}}, 0)
    assert um3.text_ids(values, 40) == 10 * 4 * 320 // 2  # ratios 2 : 1 : 1


def test_tables__both_directions_with_controls_and_what_images_cost() -> None:
    rows = [training("calmdown", "calm-down", seed, bits=2.6) for seed in (0, 1)]
    rows += [training("calmdown", "text alone", seed, right=0) for seed in (0, 1)]
    rows += [{"kind": "training", "part": "calmdown", "variant": "bad", "seed": 0, "broke": "not finite", "curve": []}]
    lines = list(um3_tables.tables(rows))
    assert lines[1] == "## calmdown"
    likelihoods = next(line for line in lines if line.startswith("| calm-down"))
    assert likelihoods == (
        "| calm-down | 5.70, 5.70 | 40; 40 | 50.0, 50.0 | 4.00, 4.00 | 1.000 (1.500), 1.000 (1.500) |"
        " 300 (310), 300 (310) | 2.600, 2.600 |"
    )
    exact = [line for line in lines if line.startswith("| calm-down")][1]
    assert exact.count("100.0 (") == 5 and "; shuffled 0.0, blind 0.0" in exact
    assert "; blind 0.0, other caption 1.0, contradicted 2.0" in exact and exact.endswith("| 2.600, 2.600 |")
    assert any(line.startswith("calm-down less text alone, captions: +100.0") for line in lines)
    assert (
        "calm-down against text alone, seed 0, 40 rows each: caption 1.000 and 1.000 nats per word, image 300 and 300"
        " bits, text 2.600 and 2.500 bits per byte"
    ) in lines
    assert "images cost +0.100 bits per byte at 4.00 M ids of text, seed 1" in lines
    assert "bad broke: seed 0: not finite" in lines
    assert next(line for line in lines if line.startswith("| bad |")) == "| bad | - | - | - | - | - | - | - |"


def test_study__continues_after_a_kill_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    stop = [3]

    def train(*arguments: Any) -> dict[str, Any]:
        folder = next(one for one in arguments if isinstance(one, Path))
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        done.append(folder.name)
        if isinstance(arguments[0], dict):
            assert arguments[0]["batch_size"] == 3
        unwanted = ("kind", "part", "variant", "seed")
        return {name: one for name, one in training("", "").items() if name not in unwanted}

    for name in ("train", "train_talker", "train_drawer"):
        monkeypatch.setattr(um3, name, train)
    arguments = ["-o", str(tmp_path / "study"), "--recipe", "um3/debug", "--set", "batch_size=3", "--scenes", "2"]
    with pytest.raises(KeyboardInterrupt):
        um3.main(["softmax", *arguments])
    stop[0] = 100
    um3.main(["softmax", "unity", *arguments])
    um3.main(["softmax", "calmdown", "--only", "separate", "calm-down", "constant 0.3", "text alone", *arguments])
    um3.main(["softmax", "calmdown", *arguments])
    trained = len(done)
    with pytest.raises(QLIPError, match="1 questions of each kind: seen has 2 to"):
        um3.main(["rows", *arguments[:1], str(tmp_path / "other"), "--per-kind", "1"])
    assert len(done) == trained
    with pytest.raises(QLIPError, match="--only deep: softmax has joint, separate"):
        um3.main(["softmax", "--only", "deep", *arguments])
    assert done[:4] == [f"softmax-{name}-{seed}" for seed in (0, 1) for name in ("separate", "joint")]
    # the recipe itself, of the part softmax, is not trained again
    assert done[4:8] == [f"unity-{name}-0" for name in ("reads-alone", "draws-alone", "talker", "drawer")]
    assert done[12:14] == [f"calmdown-{name}-0" for name in ("constant-0.3", "text-alone")]
    assert done[16:] == ["calmdown-constant-1-0", "calmdown-constant-1-1"]
    rows = [json.loads(line) for line in (tmp_path / "study/results.jsonl").read_text().splitlines()]
    keys = [tuple(row[name] for name in um3.KEY) for row in rows]
    assert len(set(keys)) == len(keys) == 22
    capsys.readouterr()
    um3.main(["-o", str(tmp_path / "study"), "--plot", str(tmp_path / "curves.png")])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 1100
    said = capsys.readouterr().out
    assert "## softmax" in said and "## unity" in said
    with pytest.raises(QLIPError, match=r"another study \(scenes differ\)"):
        um3.main(["softmax", *arguments, "--scenes", "3"])


def test_train__a_model_is_trained_measured_in_both_directions_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(um3, "POINTS", 1)
    recipe = timed.load("um3/debug")
    values = um3.recipe_of(recipe, {"model": {"softmax": "joint"}}, 0)
    found = um3.train(values, recipe["validation"], OPTIONS, tmp_path / "models/a")
    ((spent, rows, *figures),) = found["curve"]
    assert (
        spent >= 0.2 and rows % 4 == 0 and len(figures) == len(um3_tables.FIGURES) and all(one > 0 for one in figures)
    )
    assert {
        kind: {row: len(one) for row, one in found[kind].items()} for kind in ("captions", "answers", "drawings")
    } == {
        "captions": dict.fromkeys(("right", "shuffled", "blind"), 2),
        "answers": dict.fromkeys(("right", "shuffled", "blind"), 14),
        "drawings": {"right": 2, "blind": 2},
    }
    assert set(found["drawing_controls"]) == set(um3_tables.DRAWING_CONTROLS)
    assert found["text"]["bundled"] > 0 and found["text_ids"] > 0
    chat = UM3Chat.from_pretrained(tmp_path / "models/a", device="cpu")
    assert chat.model.config.softmax == "joint"


def test_train__a_training_that_breaks_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(timed, "trained", trained)
    recipe = timed.load("um3/debug")
    values = um3.recipe_of(recipe, {}, 0)
    error: Exception = CollectiveError("step 3: the loss is not finite")
    found = um3.train(values, recipe["validation"], OPTIONS, tmp_path / "models/a")
    assert found == {"broke": "step 3: the loss is not finite", "curve": []}
    error = QLIPError("no such texts")  # the study stops, and its results stay
    with pytest.raises(QLIPError, match="no such texts"):
        um3.train(values, recipe["validation"], OPTIONS, tmp_path / "models/a")


@pytest.fixture(params=HEADS)
def headed(request: pytest.FixtureRequest) -> HeadedUM3:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = CausalConfig(vocab_size=20, qk_norm=True, tie_word_embeddings=True, **sizes)
    image = {"group_size": 2, "num_groups": 3, "grid": (2, 2), "rows": "per_group"}
    config = UM3Config.extend(text, begin_image=18, end_image=19, **image)
    return HeadedUM3(UM3.from_scratch(config, "random"), request.param).eval()


def document(model: HeadedUM3, indices: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([1, 2]), whole_image(model.config, indices), torch.tensor([3, 0])])


def test_headed__text_is_that_of_a_um3_and_groups_begin_even(headed: HeadedUM3) -> None:
    flat = UM3(headed.config, headed.decoder).eval()
    one, other = torch.arange(12).view(4, 3) % 4, torch.arange(12).flip(0).view(4, 3) % 4
    rows = [
        Row("text-to-image", [document(headed, one), document(headed, other)]),
        Row("text", [torch.arange(9)]),
        Row("text-to-image", [document(headed, other)]),
    ]
    batch = stack(rows, 40)
    found, expected = headed(batch), flat(batch)
    torch.testing.assert_close(found[1], expected[1])
    assert torch.equal(found > 0, expected > 0)
    types = headed.grammar.target_types(batch.ids, batch.documents)
    torch.testing.assert_close(found[types >= VISUAL], torch.full((36,), math.log(4)))  # the head's last layer is zero
    length = len(rows[2].documents[0])
    torch.testing.assert_close(found[0, length : 2 * length], found[2, :length])  # a document sees itself alone


@torch.no_grad()
def test_headed__a_drawing_takes_the_likeliest_groups_of_the_loss(headed: HeadedUM3) -> None:
    for one in headed.head.parameters():
        one.copy_(0.5 * torch.randn_like(one))
    chat = object.__new__(HeadedChat)
    chat.model, chat.settings = headed, UM3Settings()
    seen: list[torch.Tensor] = []
    chat.encode = lambda prompt: [1, 2]  # type: ignore[method-assign, misc, assignment]
    chat.decode_image_tokens = lambda ids: [seen.append(ids)]  # type: ignore[method-assign, misc, assignment, func-returns-value]
    chat.generate(["", ""], generation_mode="image", sampling=Sampling(temperature=0.0))
    drawn = indices_of(headed.config, seen[0])
    assert torch.equal(drawn[0], drawn[1])

    def nats(indices: torch.Tensor) -> torch.Tensor:
        return headed(stack([Row("text-to-image", [document(headed, indices)])], 20))[0, 3:15].view(4, 3)

    best = nats(drawn[0])
    for token in range(4):
        for group in range(3):
            for value in set(range(4)) - {int(drawn[0, token, group])}:
                other = drawn[0].clone()
                other[token, group] = value
                assert nats(other)[token, group] > best[token, group]


def test_train_headed__is_measured_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(um3, "POINTS", 1)
    recipe = timed.load("um3/debug")
    found = um3.train_headed(recipe, "depth", OPTIONS, 0, tmp_path / "models/a")
    assert {kind: len(found[kind]["right"]) for kind in ("captions", "answers", "drawings")} == {
        "captions": 2,
        "answers": 14,
        "drawings": 2,
    }
    assert found["text"]["bundled"] > 0 and all(one > 0 for one in found["curve"][0])
    flat = um3.train(um3.recipe_of(recipe, {}, 0), recipe["validation"], OPTIONS, tmp_path / "models/b")
    assert found["parameters"] > flat["parameters"] > 40_000  # with the layers
    with pytest.raises(QLIPError, match="give rows per_group"):
        um3.train_headed(timed.load("um3/debug", ["model.rows=shared"]), "chain", OPTIONS, 0, tmp_path / "models/c")


def test_train_drawer__the_drawer_of_the_part_unity(tmp_path: Path) -> None:
    values = timed.load("t2i/debug-scenes")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = timed.load("um3/debug", ["precision=bfloat16"])
    changed = um3.as_recipe(timed.load("t2i/debug-scenes"), recipe)
    assert changed["precision"] == "bfloat16" and changed["model"]["config"]["intermediate_size"] == 48
    found = um3.train_drawer(recipe, argparse.Namespace(**vars(OPTIONS), drawer=str(path)), 0, tmp_path / "drawers/a")
    assert len(found["drawings"]["right"]) == 2 and found["parameters"] > 0
    ((spent, images),) = found["curve"]
    assert spent >= 0.2 and images > 0
    assert found["image_bits"] == pytest.approx([28 * 64] * 2, rel=0.2)
    lines = um3_tables.tables([found | {"part": "unity", "variant": "drawer", "seed": 0}])
    cell = f"| {found['image_bits'][0]:.0f} ({found['image_bits'][1]:.0f}) |"
    assert any(line.startswith("| drawer |") and cell in line for line in lines)
