"""`qlip draw`: sheets and folders of images, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qlip import files
from qlip.cli.main import run as qlip
from qlip.t2i import Drawer, DrawSettings
from tests.t2i.conftest import drawer_folder, tiny  # noqa: F401


def test_draw__one_sheet(drawer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    file = tmp_path / "sheet.png"
    assert qlip(["draw", "a cat", "a dog", "--num-images", "3", "-m", str(drawer_folder), "-o", str(file)]) == 0
    assert "6 images in" in capsys.readouterr().out
    with Image.open(file) as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 2 * 64


def test_draw__a_sheet_too_tall_for_its_format_is_refused_first(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Drawer, "draw", None)
    prompts = [f"a cat {number}" for number in range(99)]
    command = ["draw", *prompts, "--num-images", "2", "-m", str(drawer_folder), "-o", str(tmp_path / "sheet.webp")]
    assert qlip(command) == 1
    assert "WEBP cannot hold an image of" in capsys.readouterr().err


def test_draw__a_file_per_image(drawer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    command = ["draw", "a cat", "a dog", "-m", str(drawer_folder), "-o", str(tmp_path / "out"), "--seed", "3", "--json"]
    assert qlip(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in report["images"]] == ["00000.png", "00001.png"]
    assert report["settings"] == {"guidance": "2", "temperature": 0.9, "top_k": 0, "seed": 3}
    lines = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": "00000.png", "text": "a cat"}, {"file_name": "00001.png", "text": "a dog"}]
    first = (tmp_path / "out/00000.png").read_bytes()
    other = [*command, "--seed", "4"]
    assert qlip(other) == 1 and "overwrite" in capsys.readouterr().err
    assert (tmp_path / "out/00000.png").read_bytes() == first
    assert qlip([*other, "--overwrite"]) == 0
    assert (tmp_path / "out/00000.png").read_bytes() != first


def test_draw__a_stopped_folder_keeps_finished_images(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["draw", "a cat", "--num-images", "4", "-m", str(drawer_folder), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(Drawer, "AT_ONCE", 2)
    draw, calls = Drawer.draw, list[int]()

    def stopped_at_the_second_batch(self: Drawer, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Drawer, "draw", stopped_at_the_second_batch)
    assert qlip(command) == 130 and "finished images are kept" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00000.png", "00001.png"]
    assert qlip(command) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_draw__a_class_by_its_caption(drawer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    command = ["draw", "--class", "ship", "-m", str(drawer_folder), "-o", str(tmp_path / "a.png"), "--json"]
    assert qlip(command) == 0
    assert [one["prompt"] for one in json.loads(capsys.readouterr().out)["images"]] == ["a photo of a ship."]


def test_draw__rows_as_they_are_drawn(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, moving, written = tmp_path / "sheet.png", tmp_path / "sheet.gif", list[str]()
    command = ["draw", "a cat", "a dog", "-m", str(drawer_folder), "-o", str(file)]
    assert qlip(command) == 0
    plain, write = file.read_bytes(), files.write_bytes
    monkeypatch.setattr(files, "write_bytes", lambda path, data: (written.append(path.name), write(path, data)))
    assert qlip([*command, "--progressive", "--gif", str(moving)]) == 0
    assert written == ["sheet.png"] * 8 + ["sheet.gif"]
    assert file.read_bytes() == plain
    with Image.open(moving) as frames, Image.open(file) as sheet:
        assert frames.n_frames == 8 and frames.size == sheet.size  # type: ignore[attr-defined]


def test_draw__a_part_of_an_image(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (128, 128), "red").save(image)
    painted = Image.new("L", (128, 128))
    painted.paste(255, (0, 32, 128, 64))
    painted.save(mask)
    command = ["draw", "a cat", "-m", str(drawer_folder), "--image", str(image), "-o", str(tmp_path / "out")]
    assert qlip([*command, "--mask", str(mask), "--candidates", "3", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["drawn_tokens"], settings["candidates"]) == (16, 3)
    assert qlip([*command[:-1], str(tmp_path / "sheet.png"), "--keep", "0.25", "--gif", str(tmp_path / "x.gif")]) == 0
    assert "48 of 64 tokens drawn" in capsys.readouterr().out
    with Image.open(tmp_path / "x.gif") as frames:
        assert frames.n_frames == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([""], 1, "empty prompt"),
        (["a cat", "--mask", "m.png"], 2, "--mask needs --image"),
        (["a cat", "--keep", "0.5"], 2, "--keep needs --image"),
        (["a cat", "--image", "x.png"], 2, "either --mask"),
        (["a cat", "--image", "x.png", "--mask", "m.png", "--keep", "0.5"], 2, "either --mask"),
        (["a cat", "--image", "x.png", "--keep", "0.5", "--candidates", "4"], 2, "--candidates needs --mask"),
        (["a cat", "--image", "x.png", "--mask", "m.png", "--gif", "x.gif"], 2, "--candidates 1"),
        (["a cat", "--image", "no/such.png", "--keep", "0.5"], 1, "no/such.png: no such file"),
        (["a cat", "--gif", "x.png"], 2, "ends in .gif"),
        (["a cat", "--progressive", "-o", "folder"], 2, "give an image file"),
        (["--suite", "scenes", "-o", "folder", "--gif", "x.gif"], 2, "leave out --suite"),
        (["a cat", "--guidance", "much"], 1, "guidance 'much'"),
        (["a cat", "-o", "x.txt"], 2, "not an image format"),
        (["a cat", "-m", "no/such/folder"], 1, "no such folder"),
        (["a cat", "--num-images", "0"], 2, "num-images"),
        (["a cat", "--num-images", "2000"], 2, "2,000 images on one sheet; give a folder"),
        (["a cat", "-o", "x.gif", "--gif", "x.gif"], 2, "--output x.gif: is --gif too"),
        (["a cat", "--image", "x.png", "--keep", "0.5", "-o", "../" + Path.cwd().name + "/x.png"], 2, "is --image too"),
        (["a cat", "--image", "x.gif", "--keep", "0.5", "--gif", "x.gif"], 2, "--gif x.gif: is --image too"),
        (["a cat", "--negative", "a dog", "--guidance", "1"], 2, "--negative has no effect at guidance 1; give"),
        ([], 2, "give a prompt"),
        (["--class", "shp"], 1, "did you mean 'ship'"),
    ],
)
def test_draw__wrong_input(
    drawer_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    model = [] if "-m" in arguments else ["-m", str(drawer_folder)]
    assert qlip(["draw", *arguments, *model]) == code
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_draw__a_drawer_of_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("class", condition_size=1).save_pretrained(tmp_path / "alone")
    DrawSettings(guidance="2").save(tmp_path / "alone")  # its null condition was never trained
    command = ["draw", "-m", str(tmp_path / "alone"), "-o", str(tmp_path / "x.png")]
    assert qlip([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["guidance"] == "1"
    assert qlip([*command, "--guidance", "3"]) == 1
    assert "guidance 3: " in (error := capsys.readouterr().err) and "draw without guidance" in error
    tiny("class", condition_size=1, classes=("cat",)).save_pretrained(tmp_path / "alone")
    assert qlip(command) == 2 and "nothing to draw; give a prompt, or --class" in capsys.readouterr().err
