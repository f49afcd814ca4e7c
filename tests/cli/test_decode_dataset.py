"""`qlip decode` with a token dataset: files, sheets and rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip import QLIPModel, QLIPProcessor
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import INFO, Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.manage.decode import chosen_rows, file_names
from qlip.assets import BUNDLED
from qlip.errors import QLIPError
from tests.archive.made import bundled_dataset, info, made, table_of
from tests.cli.conftest import Command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(bundled_dataset(tmp_path_factory.mktemp("bundled") / "tokens").address)


def test_decode_dataset__files_are_named_by_key(qlip: Command, dataset: Path) -> None:
    ran = qlip("decode", dataset, "-o", "out", "--json")
    assert ran.code == 0 and (ran.json["written"], ran.json["skipped"]) == (18, 0)
    rows = TokenDataset(str(dataset))
    model, processor = QLIPModel.from_pretrained("bundled").eval(), QLIPProcessor.from_pretrained("bundled")
    for row in (2, 11):
        expected = processor.to_images(model.decode(rows[row][None], (8, 8)))[0]
        found = Image.open(f"out/{rows.row(row).key}.png")
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    assert len(list(Path("out").rglob("*.png"))) == 18 and Path("out/drawings/cat.png").exists()


def test_decode_dataset__rows_and_skip_existing(qlip: Command, dataset: Path) -> None:
    assert qlip("decode", dataset, "-o", "out", "--rows", "0:2,-1", "--rows", "2:4").code == 0
    assert len(list(Path("out").rglob("*.png"))) == 5 and Path("out/drawings/truck.png").exists()
    ran = qlip("decode", dataset, "-o", "out", "--skip-existing", "--json")
    assert (ran.json["written"], ran.json["skipped"]) == (13, 5)
    Path("out/cat.png").write_bytes(b"mine")
    ran = qlip("decode", dataset, "-o", "out", "--rows", "1")
    assert ran.code == 1 and "out/cat.png: exists with other content" in ran.err
    assert qlip("decode", dataset, "-o", "out", "--rows", "1", "--overwrite", "--original-size").code == 0
    assert Image.open("out/cat.png").size == (300, 300)  # the centre of 451 x 300


def test_decode_dataset__sheet(qlip: Command, dataset: Path) -> None:
    ran = qlip("decode", dataset, "--sheet", "sheet.png", "--limit", 6, "--json")
    assert ran.code == 0 and ran.json["sheet"] == {"file": "sheet.png", "images": 6}
    sheet = Image.open("sheet.png")
    assert sheet.width > 600 and sheet.height > 400
    assert list(Path().iterdir()) == [Path("sheet.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give -o DIR for one image file per row, or --sheet FILE"),
        (["-o", "x", "--rows", "18"], "row 18 of 18 in"),
        (["-o", "x", "--rows", "a:b"], "rows 'a:b': give numbers such as 5, 0:100 or -16:"),
        (["--sheet", "x.txt"], "not an image format that can be written"),
        (["more.qlip", "-o", "x"], "give one dataset at a time"),
    ],
)
def test_decode_dataset__wrong_usage(qlip: Command, dataset: Path, arguments: list[str], message: str) -> None:
    ran = qlip("decode", dataset, *arguments)
    assert ran.code != 0 and message in ran.err and len(ran.error_lines) == 1


def test_decode_dataset__dataset_of_another_model_is_refused(
    qlip: Command, dataset: Path, model: Path, tmp_path: Path
) -> None:
    ran = qlip("decode", dataset, "-o", "x", "-m", model)
    assert ran.code == 1 and "made by another model (bundled, decoder" in ran.err
    layout = made(tmp_path / "lost", model=str(tmp_path / "gone"))
    ran = qlip("decode", layout.address, "-o", "x")
    assert ran.code == 1 and "--model gives another name for it" in ran.err
    assert "--limit need a dataset" in qlip("decode", "x.qlip", "--sheet", "x.png").err


def test_decode_dataset__model_that_is_named_overrides_the_stored_name(
    qlip: Command, dataset: Path, tmp_path: Path
) -> None:
    """The name stored in the dataset does not resolve; the bundled model, which made it, is given by --model."""
    moved = tmp_path / "moved"
    shutil.copytree(dataset, moved)
    head = json.loads((moved / INFO).read_text())
    (moved / INFO).write_text(json.dumps(head | {"model": "no/where"}))
    lost = qlip("decode", moved, "-o", "out", "--rows", "0")
    assert lost.code == 1 and "(the dataset's model; --model gives another name for it)" in lost.err
    assert qlip("decode", moved, "-o", "out", "--rows", "0", "-m", BUNDLED).code == 0
    assert len(list(Path("out").rglob("*.png"))) == 1
    assert qlip("tokens", "sample", moved, "-n", 2, "--sheet", "two.png", "-m", BUNDLED).code == 0
    misfit = qlip("decode", made(tmp_path / "made").address, "-o", "x", "-m", BUNDLED)
    assert misfit.code == 1 and len(misfit.error_lines) == 1
    assert f"made by another model (made up, decoder dddddddddddd) than {BUNDLED}" in misfit.err


def test_file_names__stay_inside_the_folder_and_differ(tmp_path: Path) -> None:
    keys = ["../../etc/passwd", "/abs/a", "a//b/../c", "..", "x\0y:z", "Ü" * 200, ".jpg", "same.JPG"]
    what = info(views=Views(crops="flip"))
    table = table_of(what, [key for key in [*keys, "same.png"] for _ in range(2)], [(2, 2)], np.random.default_rng(0))
    layout = Layout(str(tmp_path / "keys"))
    layout.write_info(what)
    layout.write_manifest([layout.write_part(what, 0, "shard", 9, table)])
    dataset = TokenDataset(layout.address)
    names = list(file_names(dataset, np.arange(len(dataset))))
    assert len(set(names)) == 18 and names[0] == "__/__/etc/passwd-0" and names[-1] == "same-1~17"
    for name in names:
        assert not name.startswith("/") and ".." not in name.split("/")
        assert all(0 < len(step.encode()) <= 255 for step in name.split("/"))


def test_chosen_rows__reads_numbers_and_ranges() -> None:
    assert chosen_rows(None, 3, "d").tolist() == [0, 1, 2]
    assert chosen_rows("2, 0:2,1,-1", 5, "d").tolist() == [2, 0, 1, 4]
    assert chosen_rows("-2:", 5, "d").tolist() == [3, 4] and chosen_rows("7:9", 5, "d").tolist() == []
    for wrong in ("", "1-2", "x", "1,,2"):
        with pytest.raises(QLIPError, match="give numbers such as"):
            chosen_rows(wrong, 5, "d")
