"""Images to files and back through the command line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip import QLIPModel, QLIPProcessor
from qlip.tokens import TokenFile
from tests.cli.conftest import SIDE, TOKEN_BYTES, Command, picture


def test_a_picture_becomes_a_file_here_that_holds_the_models_tokens(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", photos / "cat.png", "-m", model)
    assert (ran.code, ran.err) == (0, "")
    tokens = TokenFile.load("cat.qlip")
    pixels = QLIPProcessor.from_pretrained(model)(images=photos / "cat.png")["pixel_values"]
    loaded = QLIPModel.from_pretrained(model)
    assert tokens.indices(loaded.group_size).equal(loaded.encode(pixels)[0])
    assert tokens.original_size == (48, 40)
    assert tokens.code_fingerprint == loaded.code_fingerprint
    assert len(tokens.bits) == TOKEN_BYTES


def test_a_folder_keeps_its_subfolders_and_comes_back(qlip: Command, model: Path, photos: Path) -> None:
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


def test_the_report_of_encode(qlip: Command, model: Path, photos: Path) -> None:
    report = qlip("encode", photos / "cat.png", "-o", "out", "-m", model, "--json").json
    loaded = QLIPModel.from_pretrained(model)
    assert report["model"] == {
        "name": str(model),
        "code_fingerprint": loaded.code_fingerprint,
        "decoder_fingerprint": loaded.decoder_fingerprint,
        "device": report["model"]["device"],
        "dtype": "float32",
    }
    assert report["results"] == [
        {
            "input": str(photos / "cat.png"),
            "output": "out/cat.qlip",
            "original_size": [48, 40],
            "grid": [4, 4],
            "tokens": 16,
            "token_bytes": TOKEN_BYTES,
            "file_bytes": Path("out/cat.qlip").stat().st_size,
            "ratio": round(3 * SIDE * SIDE / TOKEN_BYTES, 2),
        }
    ]
    assert (report["skipped"], report["failures"]) == (0, [])


def test_patterns_are_expanded_and_files_given_twice_are_one(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", f"{photos}/*.png", photos / "cat.png", "-m", model, "--json")
    assert [result["output"] for result in ran.json["results"]] == ["cat.qlip"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--fit", "keep-aspect"), [4, 8]),
        (("--size", "64", "96"), [8, 12]),
        (("--size", "64", "96", "--fit", "keep-aspect"), [6, 12]),
        (("--tiles",), [8, 12]),  # 2 x 3 tiles of 4 x 4 tokens
    ],
)
def test_other_grids_go_through(
    qlip: Command, model: Path, photos: Path, options: tuple[str, ...], expected: list[int]
) -> None:
    picture(photos / "wide.png", (96, 48), seed=5)
    ran = qlip("encode", photos / "wide.png", "-m", model, "--json", *options)
    grid = ran.json["results"][0]["grid"]
    assert grid == expected
    assert qlip("decode", "wide.qlip", "-m", model).code == 0
    assert Image.open("wide.png").size == (8 * grid[1], 8 * grid[0])


def test_decode_to_the_originals_scale(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "cat.png", "-m", model)
    assert qlip("decode", "cat.qlip", "-m", model, "--original-size").code == 0
    assert Image.open("cat.png").size == (40, 40)  # the middle square of 48 x 40


def test_a_size_that_is_no_multiple_of_the_patch(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", photos, "--size", 60, 64, "-m", model)
    assert ran.code == 2
    assert ran.error_lines == ["qlip: --size 60 64: must be multiples of the patch, 8; try 64 64"]


def test_names_that_differ_in_their_ending_keep_it(qlip: Command, model: Path, photos: Path) -> None:
    picture(photos / "cat.jpg", seed=9)
    ran = qlip("encode", photos, "-o", "out", "-m", model)
    assert ran.code == 0
    assert sorted(path.name for path in Path("out").glob("*")) == ["cat.jpg.qlip", "cat.png.qlip", "dog.qlip", "sea"]
    assert len(ran.error_lines) == 1 and "keep it in the name" in ran.err


def test_two_files_of_one_name_are_refused_before_anything_is_done(qlip: Command, model: Path, photos: Path) -> None:
    twin = picture(photos / "sea" / "cat.png", seed=9)
    ran = qlip("encode", photos / "cat.png", twin, "-o", "out", "-m", model)
    assert ran.code == 2
    assert str(twin) in ran.err and str(photos / "cat.png") in ran.err
    assert not Path("out").exists()


def test_existing_files(qlip: Command, model: Path, other_model: Path, photos: Path) -> None:
    cat = photos / "cat.png"
    assert qlip("encode", cat, "-m", model).code == 0
    written = Path("cat.qlip").read_bytes()
    assert qlip("encode", cat, "-m", model).code == 0  # the same content is no conflict

    ran = qlip("encode", cat, "-m", other_model)
    assert ran.code == 1 and "exists and holds something else; --overwrite" in ran.err
    assert len(ran.error_lines) == 1 and Path("cat.qlip").read_bytes() == written

    assert qlip("encode", cat, "-m", other_model, "--skip-existing").code == 1  # not this model's: not done before
    assert qlip("encode", cat, "-m", other_model, "--overwrite").code == 0
    assert Path("cat.qlip").read_bytes() != written


def test_skip_existing_goes_on_where_it_was(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "cat.png", "-o", "out", "-m", model)
    before = os.stat("out/cat.qlip").st_mtime_ns
    ran = qlip("encode", photos, "-o", "out", "-m", model, "--skip-existing", "--json")
    assert ran.json["skipped"] == 1
    assert len(ran.json["results"]) == 2
    assert os.stat("out/cat.qlip").st_mtime_ns == before


def test_a_broken_picture_among_good_ones(qlip: Command, model: Path, photos: Path) -> None:
    good = (photos / "dog.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "empty.png").write_bytes(b"")
    ran = qlip("encode", photos, "-o", "out", "-m", model, "--json")
    assert ran.code == 1
    assert [result["output"] for result in ran.json["results"]] == ["out/cat.qlip", "out/dog.qlip", "out/sea/ship.qlip"]
    assert [Path(failure["input"]).name for failure in ran.json["failures"]] == ["cut.jpg", "empty.png"]
    cut, empty, summary = ran.error_lines
    assert cut.startswith(f"{photos / 'cut.jpg'}: ") and empty.startswith(f"{photos / 'empty.png'}: ")
    assert summary == "2 of 5 pictures failed; the rest is done"


def test_another_models_file_is_refused_and_both_are_named(
    qlip: Command, model: Path, other_model: Path, photos: Path
) -> None:
    qlip("encode", photos / "cat.png", "-m", model)
    ran = qlip("decode", "cat.qlip", "-m", other_model)
    assert ran.code == 1 and len(ran.error_lines) == 1
    assert str(other_model) in ran.err
    assert QLIPModel.from_pretrained(model).decoder_fingerprint[:12] in ran.err
    assert QLIPModel.from_pretrained(other_model).decoder_fingerprint[:12] in ran.err
    assert not Path("cat.png").exists()


def test_a_truncated_file_among_good_ones(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos, "-o", "out", "-m", model)
    path = Path("out/cat.qlip")
    path.write_bytes(path.read_bytes()[:-7])
    ran = qlip("decode", "out", "-o", "rebuilt", "-m", model)
    assert ran.code == 1
    assert ran.error_lines[0].startswith("out/cat.qlip: cut short")
    assert ran.error_lines[1:] == ["1 of 3 files failed; the rest is done"]
    assert sorted(path.name for path in Path("rebuilt").rglob("*.png")) == ["dog.png", "ship.png"]


def test_decode_does_not_write_over_the_original(qlip: Command, model: Path, photos: Path) -> None:
    cat = (photos / "cat.png").read_bytes()
    qlip("encode", photos / "cat.png", "-o", photos, "-m", model)
    ran = qlip("decode", photos / "cat.qlip", "-o", photos, "-m", model)
    assert ran.code == 1 and "holds something else" in ran.err
    assert (photos / "cat.png").read_bytes() == cat


def test_file_names_are_no_markup(qlip: Command, model: Path, photos: Path) -> None:
    picture(photos / "[red]x[1] :smile:.png")
    assert "[red]x[1] :smile:.png" in qlip("encode", photos, "-o", "out", "-m", model).out


def test_many_results_are_summed_up(qlip: Command, model: Path, tmp_path: Path) -> None:
    for number in range(25):
        picture(tmp_path / "many" / f"{number:02d}.png", seed=number)
    ran = qlip("encode", tmp_path / "many", "-o", "out", "-m", model, "--batch-size", 4)
    assert ran.out == f"25 files written, {25 * Path('out/00.qlip').stat().st_size:,} bytes of tokens\n"
    assert not [path for path in Path("out").iterdir() if path.suffix != ".qlip"]  # nothing left aside
