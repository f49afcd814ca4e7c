"""`qlip embed`: vectors of images and texts, as .npy and .parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qlip import QLIPModel, QLIPProcessor
from tests.cli.conftest import WIDTH, Command


def test_embed__images_and_texts(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("embed", photos, "--text", "a cat", "-t", "a dog", "-o", "e.npy", "-m", model, "--json")
    assert ran.code == 0 and ran.json["shape"] == [5, WIDTH]
    assert [(row["row"], row["kind"]) for row in ran.json["results"]] == [
        (0, "image"),
        (1, "image"),
        (2, "image"),
        (3, "text"),
        (4, "text"),
    ]
    vectors = np.load("e.npy", allow_pickle=False)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    with torch.no_grad():
        output = loaded(**processor(images=photos / "sea/ship.webp", text="a dog"))
    assert output.image_embeds is not None and output.text_embeds is not None
    assert vectors[2] == pytest.approx(output.image_embeds[0].numpy(), abs=1e-5)
    assert vectors[4] == pytest.approx(output.text_embeds[0].numpy(), abs=1e-5)


def test_embed__parquet(qlip: Command, model: Path, photos: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert qlip("embed", photos, "-t", "a cat", "-o", "e.parquet", "-m", model).code == 0
    table = parquet.read_table("e.parquet")
    assert table.column_names == ["kind", "input", "embedding"]
    assert table["kind"].to_pylist() == ["image"] * 3 + ["text"]
    qlip("embed", photos, "-t", "a cat", "-o", "e.npy", "-m", model)
    assert np.array(table["embedding"].to_pylist(), np.float32) == pytest.approx(np.load("e.npy"), abs=1e-6)


def test_embed__wrong_usage(qlip: Command, photos: Path) -> None:
    assert "nothing to embed" in qlip("embed").err
    ran = qlip("embed", photos, "-o", "e.csv")
    assert ran.code == 2 and ran.error_lines == ["qlip: e.csv: must end in .npy or .parquet"]
