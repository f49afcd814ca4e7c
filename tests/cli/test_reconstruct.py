"""`qlip reconstruct`: metrics, grids, folders and tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip import QLIPModel, QLIPProcessor
from qlip.evaluation.metrics.pixel import image_psnr
from qlip.tokens import Fit, ImageCodec
from tests.cli.conftest import SIDE, TOKEN_BYTES, Command, write_image


def test_reconstruct__psnr_and_bytes(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("reconstruct", photos, "-o", "grid.png", "-m", model, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert Image.open("grid.png").format == "PNG"
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    for row, path in zip(ran.json["results"], ["cat.png", "dog.jpg", "sea/ship.webp"], strict=True):
        pixels = processor(images=photos / path)["pixel_values"]
        seen = np.asarray(processor.to_images(pixels)[0], float)
        rebuilt = np.asarray(processor.to_images(loaded.decode(loaded.encode(pixels)))[0], float)
        psnr = 10 * np.log10(255**2 / ((seen - rebuilt) ** 2).mean())
        assert row["psnr"] == pytest.approx(psnr, abs=0.01)
        assert (row["token_bytes"], row["size"], row["tiles"]) == (TOKEN_BYTES, [SIDE, SIDE], 1)


def test_reconstruct__into_a_folder(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("reconstruct", photos, "-o", "shown", "-m", model)
    assert ran.code == 0
    assert sorted(str(path) for path in Path("shown").rglob("*.png")) == [
        "shown/cat.png",
        "shown/dog.png",
        "shown/sea/ship.png",
    ]
    assert "3 images in shown" in ran.out


def test_reconstruct__tiles_cut_and_join_a_larger_image(qlip: Command, model: Path, photos: Path) -> None:
    write_image(photos / "wide.png", (100, 70), seed=6)
    ran = qlip("reconstruct", photos / "wide.png", "-o", "t.png", "--tiles", "--batch-size", 4, "-m", model, "--json")
    (row,) = ran.json["results"]
    assert (row["size"], row["tiles"], row["token_bytes"]) == ([96, 64], 6, 6 * TOKEN_BYTES)
    assert qlip("encode", photos / "wide.png", "--tiles", "-m", model).code == 0
    assert qlip("decode", "wide.qlip", "-m", model).code == 0
    rebuilt = Image.open("wide.png").convert("RGB")
    codec = ImageCodec.from_pretrained(model, device="cpu")
    [again] = codec.decode(codec.encode([photos / "wide.png"], fit="tiles"))
    assert np.array_equal(np.asarray(rebuilt), np.asarray(again))
    whole = codec.prepare(photos / "wide.png", Fit("tiles")).image
    assert row["psnr"] == round(image_psnr(whole, rebuilt), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "grid.xyz"), "grid.xyz: .xyz is not an image format that can be written; use .png, .jpg or .webp"),
        (("--tiles", "--fit", "keep-aspect"), "--tiles and --fit keep-aspect exclude each other; give one"),
    ],
)
def test_reconstruct__wrong_usage(
    qlip: Command, model: Path, photos: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = qlip("reconstruct", photos, "-m", model, *arguments)
    assert (ran.code, ran.error_lines) == (2, [f"qlip: {said}"])
