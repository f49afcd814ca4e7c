"""The benchmark of small drawers: equal-time arithmetic, intervals, CPU time, and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import drawer_tables, drawers
from qlip import QLIPModel
from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import proportion_interval
from qlip.lm import DecoderModel
from tests.archive.made import made

CURVE = [(1.0, 10, 100.0), (4.0, 40, 80.0), (16.0, 320, 50.0)]


def test_at__is_linear_in_the_logarithm_and_never_beyond_the_curve() -> None:
    assert drawer_tables.at(CURVE, 0, 2.0) == pytest.approx(90)
    assert drawer_tables.at(CURVE, 1, 20) == pytest.approx(90)
    assert drawer_tables.at(CURVE, 1, 320) == pytest.approx(50)
    assert drawer_tables.at(CURVE, 0, 0.5) is None and drawer_tables.at(CURVE, 0, 17.0) is None


def training(variant: str, seed: int, bits: list[float], curve: list[Any] = CURVE) -> dict[str, Any]:
    return {
        "kind": "training",
        "variant": variant,
        "seed": seed,
        "parameters": 2_000_000,
        "curve": curve,
        "bits": {"seen": bits},
    }


def test_bits_table__compares_at_what_the_shortest_training_reached() -> None:
    slow = [(2.0, 10, 120.0), (8.0, 40, 100.0), (16.0, 160, 60.0)]
    rows = [training("a", 0, [50.0, 52.0]), training("b", 0, [60.0, 62.0], slow)]
    rows.append({"kind": "captions", "variant": "a", "seed": 0, "own": 50.0, "other": 62.5})
    head, _, *lines = drawer_tables.bits_table(rows, {"a": "A", "b": "B"})
    assert "| 4 CPU s | 8 CPU s | 16 CPU s | 80 images | 160 images |" in head
    assert lines[0].startswith("| A | 2.00 | 320 | 50.0 | 80.0 | 65.0 | 50.0 | 70.0 | 60.0 | 51.0 | 12.5 |")
    assert lines[1].startswith("| B | 2.00 | 160 | 100.0 | 110.0 | 100.0 | 60.0 | 80.0 | 60.0 | 61.0 | - | +10.0")


def test_difference__is_of_the_seeds_that_both_have() -> None:
    first = [training("a", 0, [50.0, 52.0, 54.0]), training("a", 1, [60.0, 62.0, 64.0])]
    assert drawer_tables.difference([training("b", 1, [61.0, 63.0, 65.0])], first, "seen") == "+1.0 (+1.0 to +1.0)"
    assert drawer_tables.difference([training("b", 2, [61.0, 63.0, 65.0])], first, "seen") == "-"


def drawing(right: list[int], seed: int = 0, scale: float = 1.0, split: str = "seen") -> dict[str, Any]:
    return {"kind": "drawing", "variant": "a", "seed": seed, "guidance": scale, "split": split, "right": right}


def test_share__seeds_that_agree_are_not_more_captions() -> None:
    right = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    low, high = proportion_interval(np.array(right))
    assert low is not None and high is not None
    found = drawer_tables.share([drawing(right), drawing(right, seed=1)])
    assert found == f"30.0 ({100 * low:.1f} to {100 * high:.1f}; 30.0, 30.0)"
    other = drawer_tables.share([drawing(right), drawing(right[::-1], seed=1)])
    assert other.startswith("30.0 (") and other != found  # captions that differ between seeds say more


def test_best_scale__is_chosen_on_seen_scenes_over_all_seeds() -> None:
    rows = [drawing([1, 0, 0, 0]), drawing([0, 0, 0, 0], seed=1), drawing([1, 1, 1, 1], split="unseen_pair")]
    rows += [drawing([1, 0, 0, 0], scale=2.0), drawing([1, 0, 0, 0], seed=1, scale=2.0)]
    assert drawer_tables.best_scale(rows, (1.0, 2.0, 4.0)) == 2.0


ARGUMENTS = ["noise", "--seeds", "0", "1", "--images", "4"]


def test_study__continues_after_a_kill_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    stop = [3]

    def train(values: Any, source: Any, seconds: float, limit: int, folder: Path) -> dict[str, Any]:
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        done.append(folder.name)
        return {"parameters": 1, "curve": CURVE, "bits": {"seen": [1.0, 2.0], "unseen_pair": [2.0, 3.0]}}

    monkeypatch.setattr(drawers, "train", train)
    monkeypatch.setattr(drawers, "bits_by_caption", lambda drawer, tokens, limit: {"own": 1.0, "other": 2.0})
    monkeypatch.setattr(drawers, "of_tokenizer", lambda name, split: None)
    monkeypatch.setattr(drawers.Drawer, "from_pretrained", lambda name, device: SimpleNamespace(name=str(name)))
    monkeypatch.setattr(drawers, "score", lambda draw, split, count, distance: {"right": [1] * count})
    arguments = [*ARGUMENTS, "-o", str(tmp_path / "study")]
    with pytest.raises(KeyboardInterrupt):
        drawers.main(arguments)
    stop[0] = 100
    drawers.main(arguments)
    assert done == ["chain-0", "noise-1-0", "noise-5-0", "chain-1", "noise-1-1", "noise-5-1"]
    rows = [json.loads(line) for line in (tmp_path / "study/results.jsonl").read_text().splitlines()]
    keys = [tuple(row.get(name) for name in drawers.KEY) for row in rows]
    assert len(keys) == len(set(keys)) == 2 + 6 + 6 + 6 * 2 * len(drawers.SCALES)
    capsys.readouterr()
    drawers.main(["-o", str(tmp_path / "study")])  # the tables alone
    assert "| 5% | 0.00 | 320; 320 | 50.0, 50.0 |" in capsys.readouterr().out
    with pytest.raises(QLIPError, match=r"another study \(images differ\)"):
        drawers.main([*arguments, "--images", "5"])


def test_train__learned_positions_turn_nothing_and_its_drawer_draws(tmp_path: Path) -> None:
    fingerprint = QLIPModel.from_pretrained("bundled").code_fingerprint
    layout = made(
        tmp_path / "tokens",
        grid=(8, 8),
        group_size=7,
        embedding_dim=None,
        texts=[["a red circle"]] * 3,
        code_fingerprint=fingerprint,
    )
    tokens = layout.address
    source = drawers.Source("bundled", tokens, {"seen": tokens})
    values = drawers.recipe_of(drawers.VARIANTS["learned"], source, 0, 4)
    found = drawers.train(values, source, 0.2, 8, tmp_path / "drawers/learned-0")
    spent, images, bits = found["curve"][-1]
    assert spent >= 0.2 and images % 4 == 0 and 0 < bits < 2000 and len(found["bits"]["seen"]) == 8
    model = DecoderModel.from_pretrained(tmp_path / "drawers/learned-0")
    assert model.target_positions is not None
    table = model.rotary()
    torch.testing.assert_close(table, torch.tensor([1.0, 0.0]).expand_as(table))
    bits = drawers.bits_by_caption(tmp_path / "drawers/learned-0", tokens, 8)
    assert bits["own"] == bits["other"] == pytest.approx(np.mean(found["bits"]["seen"]), abs=0.1)  # one caption for all
    drawer = drawers.Drawer.from_pretrained(tmp_path / "drawers/learned-0", device="cpu")
    row = drawers.score(drawers.of_drawer(drawer, 2.0, 0.9, 0, 0), "seen", 2, False)
    assert len(row["right"]) == 2 and row["cpu_ms"] > 0
    assert drawers.score(drawers.of_tokenizer("bundled", "seen"), "seen", 2, False)["right"] == [1, 1]
