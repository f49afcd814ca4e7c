"""Results of version 0.1 come out again: a debug training of both stages, tokens, embeddings and metrics.

The numbers in tests/fixtures/version-0.1 were written by version 0.1's code with the bundled model of today, version 2:
commit 58d6b9c, to which only the scenes, the filters and this debug recipe were added that version 2 needs. Those of
version 1 of the model, written by 58d6b9c itself, were equal to the last bit too until version 2 took its place.
Elsewhere rounding differs, so the bounds here leave room for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlip import assets
from qlip.archive import TokenDataset
from qlip.cli.main import run

FIXTURE = Path(__file__).parent / "fixtures" / "version-0.1"
VALUES: dict[str, Any] = json.loads((FIXTURE / "values.json").read_text())
IMAGES = str(assets.path("images"))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """``indices`` uint8 (18, 64, 4) and ``embeddings`` float32 (18, 128) of the bundled images, sorted by key."""
    return load_file(FIXTURE / "tokens.safetensors")


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_bundled_model__is_the_one_that_the_numbers_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    """A new bundled model needs new numbers, written by the code before the change."""
    assert run(["info", "--json"]) == 0
    assert VALUES["codes"] in capsys.readouterr().out


def test_both_stages_of_training__log_the_losses_of_version_0_1(tmp_path: Path) -> None:
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    assert run(["train", "nano/debug-stage1", "model={init: bundled}", "vocabulary=null", "-o", str(first)]) == 0
    options = [f"model.init={first / 'model'}", "losses.alpha_p=0"]
    assert run(["train", "nano/debug-stage2", *options, "-o", str(second)]) == 0
    for folder, expected in ((first, VALUES["logs"]["stage1"]), (second, VALUES["logs"]["stage2"])):
        found = logged(folder)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (folder.name, ours["step"], name)


def test_a_tokenised_dataset__has_the_rows_and_codes_of_version_0_1(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    assert run(["tokenize", IMAGES, "-o", str(tmp_path / "tokens")]) == 0
    dataset = TokenDataset(tmp_path / "tokens")
    assert list(dataset.keys(np.arange(len(dataset)))) == VALUES["keys"]
    found = np.stack([dataset[row].numpy() for row in range(len(dataset))]).astype(np.uint8)
    changed = np.unpackbits(found ^ arrays["indices"]).sum()
    assert changed <= 4, f"{changed} bits of {28 * 64 * len(dataset)} differ"


def test_embeddings__are_those_of_version_0_1(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    assert run(["embed", IMAGES, "-o", str(tmp_path / "vectors.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), arrays["embeddings"], atol=1e-5)


def test_evaluation__gives_the_metrics_of_version_0_1(tmp_path: Path) -> None:
    chosen = [option for name in VALUES["metrics"] for option in ("--evaluator", name)]
    assert run(["eval", "--data", IMAGES, *chosen, "-o", str(tmp_path / "result")]) == 0
    measured = json.loads((tmp_path / "result" / "result.json").read_text())["measured"]
    found = {one["evaluator"]: one["values"] for one in measured}
    for evaluator, expected in VALUES["metrics"].items():
        for name, value in expected.items():
            assert found[evaluator][name]["value"] == pytest.approx(value, rel=1e-3), (evaluator, name)
