"""`qlip draw --suite`: benchmarks and made scenes by the command, and options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip.cli.main import run as qlip
from qlip.errors import QLIPError
from qlip.evaluation.report.result import Result
from qlip.t2i import Drawer, Drawing, DrawSettings
from tests.t2i.conftest import drawer, drawer_folder, tiny  # noqa: F401
from tests.um3.conftest import um3_folder  # noqa: F401

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawer of three classes."""
    folder = tmp_path_factory.mktemp("drawer") / "classes"
    tiny("class", classes=("cat", "dog", "ship")).save_pretrained(folder)
    return folder


def test_draw_suite__scenes_are_drawn_and_scored(drawer_folder: Path, tmp_path: Path, capsys: Captured) -> None:  # noqa: F811
    out = tmp_path / "scenes"
    command = ["draw", "--suite", "scenes", "--split", "hard", "--limit", "3", "-m", str(drawer_folder), "-o", str(out)]
    assert qlip(command) == 0
    said = capsys.readouterr().out
    assert "right size" in said and "rebuilt" in said and "95% interval" in said
    result = Result.load(out / "result.json")
    (row,) = result.measured
    assert row.data == "scenes:hard" and row.count == 3 and row.values["scenes_right"].value == 0
    assert row.values["scenes_rebuilt"].value == 100 and row.options["guidance"] == "2"
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 272
    images = {path: path.stat().st_mtime_ns for path in out.glob("images/*.png")}
    assert len(images) == 3 and qlip([*command, "--json"]) == 0
    assert Result.model_validate(json.loads(capsys.readouterr().out)).measured[0].values == row.values
    assert {path: path.stat().st_mtime_ns for path in images} == images
    assert qlip([*command, "--seed", "1"]) == 1
    assert "was begun with other settings (seed differ)" in capsys.readouterr().err
    assert qlip(["compare", str(out)]) == 0
    assert qlip(["eval", "--verify", str(out)]) == 2
    assert "measure them again with qlip draw --suite scenes" in capsys.readouterr().err


def test_draw_suite__same_images_in_batches_of_another_size(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    (tmp_path / "prompts.tsv").write_text("Prompt\tCategory\na cat\tx\na dog\tx\na ship\tx\n")
    command = ["draw", "--suite", "parti", "--suite-data", str(tmp_path / "prompts.tsv"), "-m", str(drawer_folder)]
    assert qlip([*command, "-o", str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == report["drawn"] == 3 and report["settings"]["temperature"] == 0.9
    monkeypatch.setattr("qlip.t2i.Drawer.AT_ONCE", 2)
    assert qlip([*command, "-o", str(tmp_path / "b")]) == 0
    assert "3 images of parti drawn: " in capsys.readouterr().out
    first, second = (sorted((tmp_path / name / "images").iterdir()) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_draw_suite__adm_draws_classes_in_turn(class_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "samples"
    assert qlip(["draw", "--suite", "adm", "--limit", "4", "-m", str(class_folder), "-o", str(out)]) == 0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (4, 64, 64, 3)
    (out / "000001.png").unlink()
    assert qlip(["draw", "--suite", "adm", "--limit", "4", "-m", str(class_folder), "-o", str(out)]) == 0
    assert "1 image of adm drawn, 3 were there" in capsys.readouterr().out


def test_drawing__classes_of_a_drawer_of_captions(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert Drawing(drawer).classes == ["a photo of a cat.", "a photo of a ship."]
    monkeypatch.setattr(drawer, "settings", DrawSettings())
    with pytest.raises(QLIPError, match="was not trained on classes, and suite adm draws them"):
        Drawing(drawer).classes  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--limit", "3", "a cat"], 2, "--limit needs --suite"),
        (["--suite-data", "x", "a cat"], 2, "--suite-data needs --suite"),
        (["--suite", "scenes"], 2, "--suite needs --output, a folder"),
        (["--suite", "scenes", "-o", "out", "a cat"], 2, "leave out PROMPT, --class and --num-images"),
        (["--suite", "geneval", "-o", "out"], 2, "--suite geneval needs --suite-data"),
        (["--suite", "scenes", "-o", "out", "--suite-data", "x"], 2, "--suite scenes has no prompt files"),
        (
            ["--suite", "geneval", "-o", "out", "--suite-data", "x", "--split", "seen"],
            2,
            "--split is for --suite scenes",
        ),
        (["--suite", "geneval", "-o", "out", "--suite-data", "no.jsonl"], 1, "no.jsonl: No such file"),
        (["--suite", "hpsv2", "-o", "out", "--suite-data", "long.json"], 1, "long.json, photo 1: prompt 'a a a a"),
        (["--suite", "scenes", "-o", "file"], 2, "--output file: is a file; a suite is drawn into a folder"),
    ],
)
def test_draw_suite__wrong_input_is_one_line(
    drawer_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.json").write_text(json.dumps({"photo": ["a cat", "a " * 40]}))
    Path("file").touch()
    assert qlip(["draw", *arguments, "-m", str(drawer_folder)]) == code
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "long.json"]


def test_draw_suite__a_um3_draws_it(um3_folder: Path, tmp_path: Path, capsys: Captured) -> None:  # noqa: F811
    out = tmp_path / "scenes"
    command = ["draw", "--suite", "scenes", "--limit", "2", "-m", str(um3_folder), "-o", str(out), "--guidance", "2"]
    assert qlip([*command, "--json"]) == 0
    (row,) = Result.model_validate(json.loads(capsys.readouterr().out)).measured
    assert row.count == 2 and row.options["guidance"] == "2" and row.options["top_p"] == 0.95
    assert len(list(out.glob("images/*.png"))) == 2
    captions, coco = tmp_path / "coco.csv", tmp_path / "coco"
    captions.write_text("Prompt\na cup\na red circle\n")
    command[2:5] = ["coco30k", "--suite-data", str(captions)]
    command[command.index(str(out))] = str(coco)
    assert qlip(command) == 0
    assert len(list(coco.glob("images/*.png"))) == 2
    assert (coco / "captions.txt").read_text().splitlines() == ["a cup", "a red circle"]
    capsys.readouterr()
    assert qlip(["draw", "a cat", "-m", str(um3_folder), "-o", str(tmp_path / "a.png")]) == 2
    assert f"draw a prompt with qlip um3 complete -m {um3_folder} -o FILE PROMPT" in capsys.readouterr().err
    assert qlip([*command, "--negative", "red"]) == 2
    assert "--negative has no effect on a UM3" in capsys.readouterr().err
