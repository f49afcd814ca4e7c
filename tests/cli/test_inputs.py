"""Input files: patterns, folders and names of results."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Command, write_image


def test_inputs__patterns_are_expanded_and_repeated_files_count_once(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", f"{photos}/*.png", photos / "cat.png", "-m", model, "--json")
    assert [result["output"] for result in ran.json["results"]] == ["cat.qlip"]


def test_inputs__names_that_differ_only_in_their_suffix_keep_it(qlip: Command, model: Path, photos: Path) -> None:
    write_image(photos / "cat.jpg", seed=9)
    ran = qlip("encode", photos, "-o", "out", "-m", model)
    assert ran.code == 0
    assert sorted(path.name for path in Path("out").glob("*")) == ["cat.jpg.qlip", "cat.png.qlip", "dog.qlip", "sea"]
    assert len(ran.error_lines) == 1 and "keep it in the name" in ran.err


def test_inputs__two_files_of_one_name_are_refused_before_any_work(qlip: Command, model: Path, photos: Path) -> None:
    twin = write_image(photos / "sea" / "cat.png", seed=9)
    ran = qlip("encode", photos / "cat.png", twin, "-o", "out", "-m", model)
    assert ran.code == 2
    assert str(twin) in ran.err and str(photos / "cat.png") in ran.err
    assert not Path("out").exists()
