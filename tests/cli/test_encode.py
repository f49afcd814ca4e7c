"""`qlip encode`: files, their report, existing files and broken images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from qlip import QLIPModel, QLIPProcessor
from qlip.tokens import TokenFile
from tests.cli.conftest import TOKEN_BYTES, Command, write_image


def test_encode__file_holds_the_models_tokens(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", photos / "cat.png", "-m", model)
    assert (ran.code, ran.err) == (0, "")
    tokens = TokenFile.load("cat.qlip")
    pixels = QLIPProcessor.from_pretrained(model)(images=photos / "cat.png")["pixel_values"]
    loaded = QLIPModel.from_pretrained(model)
    assert tokens.indices(loaded.group_size).equal(loaded.encode(pixels)[0])
    assert tokens.original_size == (48, 40)
    assert tokens.code_fingerprint == loaded.code_fingerprint
    assert len(tokens.bits) == TOKEN_BYTES


def test_encode__json_report(qlip: Command, model: Path, photos: Path) -> None:
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
            "input_bytes": photos.joinpath("cat.png").stat().st_size,
            "original_size": [48, 40],
            "grid": [4, 4],
            "tokens": 16,
            "token_bytes": TOKEN_BYTES,
            "file_bytes": Path("out/cat.qlip").stat().st_size,
            "ratio": round(photos.joinpath("cat.png").stat().st_size / Path("out/cat.qlip").stat().st_size, 3),
        }
    ]
    assert (report["skipped"], report["failures"]) == (0, [])


def test_encode__size_must_be_a_multiple_of_the_patch(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("encode", photos, "--size", 60, 64, "-m", model)
    assert ran.code == 2
    assert ran.error_lines == ["qlip: --size 60 64: must be multiples of the patch, 8; try 64 64"]


def test_encode__existing_files_are_replaced_only_with_overwrite(
    qlip: Command, model: Path, other_model: Path, photos: Path
) -> None:
    cat = photos / "cat.png"
    assert qlip("encode", cat, "-m", model).code == 0
    written = Path("cat.qlip").read_bytes()
    assert qlip("encode", cat, "-m", model).code == 0  # the same content is no conflict

    ran = qlip("encode", cat, "-m", other_model)
    assert ran.code == 1 and "exists with other content; --overwrite" in ran.err
    assert len(ran.error_lines) == 1 and Path("cat.qlip").read_bytes() == written

    assert qlip("encode", cat, "-m", other_model, "--skip-existing").code == 1  # another model's file is not skipped
    assert qlip("encode", cat, "-m", other_model, "--overwrite").code == 0
    assert Path("cat.qlip").read_bytes() != written


def test_encode__skip_existing_continues(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "cat.png", "-o", "out", "-m", model)
    before = os.stat("out/cat.qlip").st_mtime_ns
    ran = qlip("encode", photos, "-o", "out", "-m", model, "--skip-existing", "--json")
    assert ran.json["skipped"] == 1
    assert len(ran.json["results"]) == 2
    assert os.stat("out/cat.qlip").st_mtime_ns == before


def test_encode__broken_image_among_good_ones(qlip: Command, model: Path, photos: Path) -> None:
    good = (photos / "dog.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "empty.png").write_bytes(b"")
    ran = qlip("encode", photos, "-o", "out", "-m", model, "--json")
    assert ran.code == 1
    assert [result["output"] for result in ran.json["results"]] == ["out/cat.qlip", "out/dog.qlip", "out/sea/ship.qlip"]
    assert [Path(failure["input"]).name for failure in ran.json["failures"]] == ["cut.jpg", "empty.png"]
    cut, empty, summary = ran.error_lines
    assert cut.startswith(f"{photos / 'cut.jpg'}: ") and empty.startswith(f"{photos / 'empty.png'}: ")
    assert summary == "2 of 5 images failed; the others are done"


def test_encode__file_names_are_not_markup(qlip: Command, model: Path, photos: Path) -> None:
    write_image(photos / "[red]x[1] :smile:.png")
    assert "[red]x[1] :smile:.png" in qlip("encode", photos, "-o", "out", "-m", model).out


def test_encode__many_results_are_summarised(qlip: Command, model: Path, tmp_path: Path) -> None:
    for number in range(25):
        write_image(tmp_path / "many" / f"{number:02d}.png", seed=number)
    ran = qlip("encode", tmp_path / "many", "-o", "out", "-m", model, "--batch-size", 4)
    assert ran.out == f"25 files written, {25 * Path('out/00.qlip').stat().st_size:,} bytes of tokens\n"
    assert not [path for path in Path("out").iterdir() if path.suffix != ".qlip"]  # nothing left aside


def test_encode__output_that_cannot_be_written(qlip: Command, photos: Path, model: Path) -> None:
    Path("taken").write_text("a file")
    ran = qlip("encode", photos / "cat.png", "-o", "taken", "-m", model)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "taken" in ran.err


def test_encode__ctrl_c_keeps_finished_files(tmp_path: Path, model: Path) -> None:
    one = write_image(tmp_path / "many" / "000.png", (400, 300))
    for number in range(1, 300):
        (one.parent / f"{number:03d}.png").hardlink_to(one)
    command = [sys.executable, "-m", "qlip", "encode", "many", "-o", "out", "-m", str(model), "--batch-size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/*.qlip")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == [
        "stopped; finished files are kept; run the same command with --skip-existing to continue"
    ]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert 0 < len(written) < 300 and all(name.endswith(".qlip") for name in written)
    assert subprocess.run([*command, "--skip-existing"], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert len(list((tmp_path / "out").glob("*.qlip"))) == 300
