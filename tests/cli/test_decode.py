"""`qlip decode` with .qlip files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.tokens import TokenFile
from tests.cli.conftest import SIDE, Command, write_image


def test_decode__folder_keeps_its_subfolders(qlip: Command, model: Path, photos: Path) -> None:
    assert qlip("encode", photos, "-o", "tokens", "-m", model).code == 0
    assert sorted(str(path) for path in Path("tokens").rglob("*.*")) == [
        "tokens/cat.qlip",
        "tokens/dog.qlip",
        "tokens/sea/ship.qlip",
    ]
    ran = qlip("decode", "tokens", "-o", "rebuilt", "-m", model, "--json")
    assert ran.code == 0
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    tokens = TokenFile.load("tokens/sea/ship.qlip")
    expected = processor.to_images(loaded.decode(tokens.indices(loaded.group_size)[None], tokens.grid))[0]
    difference = np.asarray(Image.open("rebuilt/sea/ship.png"), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1  # another batch size may move a float
    assert [result["size"] for result in ran.json["results"]] == [[SIDE, SIDE]] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--fit", "keep-aspect"), [4, 8]),
        (("--size", "64", "96"), [8, 12]),
        (("--size", "64", "96", "--fit", "keep-aspect"), [6, 12]),
        (("--tiles",), [8, 12]),  # 2 x 3 tiles of 4 x 4 tokens
    ],
)
def test_decode__other_grids(
    qlip: Command, model: Path, photos: Path, options: tuple[str, ...], expected: list[int]
) -> None:
    write_image(photos / "wide.png", (96, 48), seed=5)
    ran = qlip("encode", photos / "wide.png", "-m", model, "--json", *options)
    grid = ran.json["results"][0]["grid"]
    assert grid == expected
    assert qlip("decode", "wide.qlip", "-m", model).code == 0
    assert Image.open("wide.png").size == (8 * grid[1], 8 * grid[0])


def test_decode__original_size(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "cat.png", "-m", model)
    assert qlip("decode", "cat.qlip", "-m", model, "--original-size").code == 0
    assert Image.open("cat.png").size == (40, 40)  # the middle square of 48 x 40


def test_decode__file_of_another_model_is_refused_naming_both(
    qlip: Command, model: Path, other_model: Path, photos: Path
) -> None:
    qlip("encode", photos / "cat.png", "-m", model)
    ran = qlip("decode", "cat.qlip", "-m", other_model)
    assert ran.code == 1 and len(ran.error_lines) == 1
    assert str(other_model) in ran.err
    assert QLIPModel.from_pretrained(model).decoder_fingerprint[:12] in ran.err
    assert QLIPModel.from_pretrained(other_model).decoder_fingerprint[:12] in ran.err
    assert not Path("cat.png").exists()


def test_decode__file_of_the_bundled_models_version_1_says_what_to_do(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "cat.png", "-m", model)
    tokens = replace(TokenFile.load("cat.qlip"), code_fingerprint=assets.VERSION_1_CODES, decoder_fingerprint="9a" * 32)
    tokens.save("cat.qlip")
    ran = qlip("decode", "cat.qlip")
    assert ran.code == 1 and len(ran.error_lines) == 1
    assert "another model" in ran.err and "encode the images again, or use qlip 0.1" in ran.err


def test_decode__truncated_file_among_good_ones(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos, "-o", "out", "-m", model)
    path = Path("out/cat.qlip")
    path.write_bytes(path.read_bytes()[:-7])
    ran = qlip("decode", "out", "-o", "rebuilt", "-m", model)
    assert ran.code == 1
    assert ran.error_lines[0].startswith("out/cat.qlip: truncated")
    assert ran.error_lines[1:] == ["1 of 3 files failed; the others are done"]
    assert sorted(path.name for path in Path("rebuilt").rglob("*.png")) == ["dog.png", "ship.png"]


def test_decode__original_is_not_overwritten(qlip: Command, model: Path, photos: Path) -> None:
    cat = (photos / "cat.png").read_bytes()
    qlip("encode", photos / "cat.png", "-o", photos, "-m", model)
    ran = qlip("decode", photos / "cat.qlip", "-o", photos, "-m", model)
    assert ran.code == 1 and "exists with other content" in ran.err
    assert (photos / "cat.png").read_bytes() == cat


def test_decode__too_many_tokens_are_refused_unless_allowed(qlip: Command, model: Path, photos: Path) -> None:
    """Attention takes the square of the time: 65,536 tokens, a few kilobytes when coded, take five minutes."""
    assert qlip("encode", photos / "cat.png", "-m", model, "--size", 64, 96).code == 0
    ran = qlip("decode", "cat.qlip", "-m", model, "--max-tokens", 95)
    assert ran.code == 1
    assert ran.error_lines == ["cat.qlip: 96 tokens, and 95 are allowed; allow more with --max-tokens 96"]
    assert qlip("decode", "cat.qlip", "-m", model, "--max-tokens", 96).code == 0
    assert qlip("encode", photos / "dog.jpg", "-m", model, "--size", 64, 96, "--tiles", "-o", "tiles").code == 0
    assert qlip("decode", "tiles", "-m", model, "--max-tokens", 16).code == 0  # 96 tokens, 16 of a tile
