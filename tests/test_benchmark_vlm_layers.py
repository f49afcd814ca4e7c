"""The benchmark of layers and towers of small talkers: recipes, tables, and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from benchmarks import vlm_layers
from qlip.data.public.scene_questions import KINDS
from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import proportion_interval
from qlip.vlm.chat import VisionChat

RECIPE = {
    "name": "tiny-talker",
    "task": "vlm",
    "model": {
        "template": "qa",
        "pool": 2,
        "vocabulary": 300,
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
        },
    },
    "data": {"questions": "train", "max_length": 96, "num_workers": 2},
    "batch_size": 2,
    "schedule": {"steps": 100, "warmup": 2},
    "validation": {"every": 10},
}
CURVE = [(0.7, 7, 10.0, 10.0), (1.0, 10, 20.0, 21.0), (1.4, 14, 30.0, 25.0), (2.0, 20, 40.0, 29.0)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def training(variant: str, seed: int, right: list[int], part: str = "layers") -> dict[str, Any]:
    answers = {"right": right, "shuffled": [0] * len(right), "blind": [0] * len(right)}
    return {
        "kind": "training",
        "part": part,
        "variant": variant,
        "seed": seed,
        "parameters": 8_000_000,
        "curve": CURVE,
        "answers": {"seen": answers, "unseen_pair": answers},
    }


def test_recipe_of__rates_are_constant_and_all_work_is_in_this_process(recipe: Path) -> None:
    values = vlm_layers.recipe_of(str(recipe), "folder", "quantized", 2)
    assert values["model"]["vision_tower"] == "folder" and values["model"]["layer"] == "quantized"
    assert values["data"] == {"questions": "train", "max_length": 96, "num_workers": 0}
    assert values["seed"] == 2 and values["schedule"] == {"steps": 10**9, "warmup": 2, "floor": 1.0}
    assert "validation" not in values and values["threads"] == 1
    overrides = ["data.captions=0.5", "optimizer.parts.projector=0.001"]
    values = vlm_layers.recipe_of(str(recipe), "folder", -1, 2, overrides)
    assert values["optimizer"]["parts"] == {"projector": 1e-3} and values["data"]["captions"] == 0.5


def test_split_table__right_and_shuffled_by_kind_over_the_seeds() -> None:
    first = [1] * 7 + [1, 0, 0, 0, 0, 0, 0]
    rows = {"layer -2": [training("layer -2", 0, first), training("layer -2", 1, [1] * 14)]}
    head, _, majority, line = vlm_layers.split_table(rows, "seen")
    assert head == f"| seen | right, % | shuffled | blind | {' | '.join(KINDS)} |"
    assert majority.startswith("| majority | ")
    low, high = proportion_interval(np.array(first) + 1.0, np.full(14, 2.0))
    assert low is not None and high is not None
    right = f"78.6 ({100 * low:.1f} to {100 * high:.1f}; 57.1, 100.0)"
    kinds = " | ".join(["100.0 (0.0)", *["75.0 (0.0)"] * 6])
    assert line == f"| layer -2 | {right} | 0.0 | 0.0 | {kinds} |"


def test_curve_table__is_of_every_seed() -> None:
    rows = {"a": [training("a", 0, [1] * 14), training("a", 1, [1] * 14)]}
    head, _, line = vlm_layers.curve_table(rows)
    assert head.endswith("| 1 CPU s | 2 CPU s |")
    assert line == "| a | 8.00 | 20; 20 | 100.0, 100.0 | 20 (21), 20 (21) | 40 (29), 40 (29) |"


def test_verdicts__need_every_seed() -> None:
    best, good, bad = [1] * 14, [1] * 13 + [0], [1] * 7 + [0] * 7
    rows = {
        "a": [training("a", 0, best), training("a", 1, good)],
        "b": [training("b", 0, bad), training("b", 1, bad)],
        "c": [training("c", 0, bad), training("c", 1, best), training("c", 2, best)],
    }
    above, not_above = vlm_layers.verdicts(rows)
    assert above.startswith("a is above b in every seed: yes; +46.4 (") and above.endswith("by seed +50.0, +42.9")
    assert not_above.startswith("a is above c in every seed: no; ") and not_above.endswith("by seed +50.0, -7.1")


def test_study__continues_after_a_kill_with_what_is_missing(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int | str, str]] = []
    stop = [4]

    def train(values: Any, seconds: float, per_kind: int, folder: Path) -> dict[str, Any]:
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        done.append((folder.name, values["model"]["layer"], values["model"]["vision_tower"]))
        found = training("", 0, [1] * 14)
        return {name: found[name] for name in ("parameters", "curve", "answers")}

    monkeypatch.setattr(vlm_layers, "train", train)
    arguments = ["-o", str(tmp_path / "study"), "--recipe", str(recipe), "--seeds", "0", "1", "--per-kind", "2"]
    with pytest.raises(KeyboardInterrupt):
        vlm_layers.main(["layers", *arguments])
    stop[0] = 100
    vlm_layers.main(["layers", "towers", *arguments, "--tower", "aligned", "A", "--tower", "plain", "B"])
    assert [name for name, *_ in done] == [
        *(f"layers-{name}-{seed}" for seed in (0, 1) for name in ("layer-2", "layer-1", "quantized")),
        *(f"towers-{name}-{seed}" for seed in (0, 1) for name in ("aligned", "plain")),
    ]
    assert done[2] == ("layers-quantized-0", "quantized", "bundled") and done[7] == ("towers-plain-0", -2, "B")
    rows = [json.loads(line) for line in (tmp_path / "study/results.jsonl").read_text().splitlines()]
    keys = [tuple(row[name] for name in vlm_layers.KEY) for row in rows]
    assert len(set(keys)) == len(keys) == 10
    capsys.readouterr()
    vlm_layers.main(["-o", str(tmp_path / "study")])
    said = capsys.readouterr().out
    assert "## layers" in said and "## towers" in said and "| majority |" in said
    assert "layer -2 is above quantized in every seed: no; +0.0 (" in said
    with pytest.raises(QLIPError, match=r"another study \(per_kind differ\)"):
        vlm_layers.main(["layers", *arguments, "--per-kind", "3"])
    rates = ["--only", "quantized", "--projector-lr", "0.001", "0.01"]
    vlm_layers.main(["layers", *arguments, *rates])
    assert [name for name, *_ in done[10:]] == [
        f"layers-quantized,lr{lr}-{seed}" for seed in (0, 1) for lr in rates[3:]
    ]
    with pytest.raises(QLIPError, match="--only codes: layers has layer -2, layer -1, quantized"):
        vlm_layers.main(["layers", *arguments, "--only", "codes"])


def test_train__a_talker_is_trained_asked_and_exported(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm_layers, "PER_POINT", 2)
    monkeypatch.setattr(vlm_layers, "POINTS", 1)
    values = vlm_layers.recipe_of(str(recipe), "bundled", -2, 0)
    found = vlm_layers.train(values, 0.2, 2, tmp_path / "talkers/a")
    ((spent, answers, right, shuffled),) = found["curve"]
    assert spent >= 0.2 and answers % 2 == 0 and 0 <= right <= 100 and 0 <= shuffled <= 100
    assert {name: list(rows) for name, rows in found["answers"].items()} == {
        split: ["right", "shuffled", "blind"] for split in ("seen", "unseen_pair")
    }
    assert all(len(one) == 14 for rows in found["answers"].values() for one in rows.values())
    talker = VisionChat.from_pretrained(tmp_path / "talkers/a", device="cpu")
    assert found["parameters"] == sum(
        one.numel() for one in load_file(tmp_path / "talkers/a/model.safetensors").values()
    )
    assert talker.model.config.layer == -2 and isinstance(talker.ask("Is there a red circle?"), str)
