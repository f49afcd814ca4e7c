"""Datasets on the command line: looked at, verified, merged, split, sampled, exported, and decoded to images."""

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
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(bundled_dataset(tmp_path_factory.mktemp("bundled") / "tokens").address)


def test_decode_rebuilds_a_datasets_pictures_named_by_key(qlip: Command, pictures: Path) -> None:
    ran = qlip("decode", pictures, "-o", "out", "--json")
    assert ran.code == 0 and (ran.json["written"], ran.json["skipped"]) == (18, 0)
    dataset = TokenDataset(str(pictures))
    model, processor = QLIPModel.from_pretrained("bundled").eval(), QLIPProcessor.from_pretrained("bundled")
    for row in (2, 11):
        expected = processor.to_images(model.decode(dataset[row][None], (8, 8)))[0]
        found = Image.open(f"out/{dataset.row(row).key}.png")
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    assert len(list(Path("out").rglob("*.png"))) == 18 and Path("out/drawings/cat.png").exists()


def test_decode_goes_on_and_takes_rows(qlip: Command, pictures: Path) -> None:
    assert qlip("decode", pictures, "-o", "out", "--rows", "0:4,-1").code == 0
    assert len(list(Path("out").rglob("*.png"))) == 5 and Path("out/drawings/truck.png").exists()
    ran = qlip("decode", pictures, "-o", "out", "--skip-existing", "--json")
    assert (ran.json["written"], ran.json["skipped"]) == (13, 5)
    Path("out/cat.png").write_bytes(b"mine")
    ran = qlip("decode", pictures, "-o", "out", "--rows", "1")
    assert ran.code == 1 and "out/cat.png: exists and holds something else" in ran.err
    assert qlip("decode", pictures, "-o", "out", "--rows", "1", "--overwrite", "--original-size").code == 0
    assert Image.open("out/cat.png").size == (300, 300)  # the middle of 451 x 300


def test_decode_draws_a_sheet(qlip: Command, pictures: Path) -> None:
    ran = qlip("decode", pictures, "--sheet", "sheet.png", "--sample", 6, "--json")
    assert ran.code == 0 and ran.json["sheet"] == {"file": "sheet.png", "pictures": 6}
    sheet = Image.open("sheet.png")
    assert sheet.width > 600 and sheet.height > 400
    assert list(Path().iterdir()) == [Path("sheet.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give -o DIR for a picture a row, or --sheet FILE"),
        (["-o", "x", "--rows", "18"], "row 18 of 18 in"),
        (["-o", "x", "--rows", "a:b"], "rows 'a:b': give numbers such as 5, 0:100 or -16:"),
        (["--sheet", "x.txt"], "no picture format to write"),
        (["more.qlip", "-o", "x"], "give one dataset at a time"),
    ],
)
def test_decode_refuses(qlip: Command, pictures: Path, arguments: list[str], message: str) -> None:
    ran = qlip("decode", pictures, *arguments)
    assert ran.code != 0 and message in ran.err and len(ran.error_lines) == 1


def test_decode_refuses_another_models_dataset_and_options_without_one(
    qlip: Command, pictures: Path, model: Path, tmp_path: Path
) -> None:
    ran = qlip("decode", pictures, "-o", "x", "-m", model)
    assert ran.code == 1 and "made by another model (bundled, decoder" in ran.err
    layout = made(tmp_path / "lost", model=str(tmp_path / "gone"))
    ran = qlip("decode", layout.address, "-o", "x")
    assert ran.code == 1 and "--model gives another name for it" in ran.err
    assert "go with a dataset" in qlip("decode", "x.qlip", "--sheet", "x.png").err


def test_the_model_that_is_named_rebuilds_even_the_default_one(qlip: Command, pictures: Path, tmp_path: Path) -> None:
    """A dataset whose own name of its model leads nowhere; the bundled model made it, and is told so."""
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
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


def test_names_stay_inside_the_folder_and_differ(tmp_path: Path) -> None:
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


def test_rows_as_a_person_types_them() -> None:
    assert chosen_rows(None, 3, "d").tolist() == [0, 1, 2]
    assert chosen_rows("2, 0:2,1,-1", 5, "d").tolist() == [2, 0, 1, 4]
    assert chosen_rows("-2:", 5, "d").tolist() == [3, 4] and chosen_rows("7:9", 5, "d").tolist() == []
    for wrong in ("", "1-2", "x", "1,,2"):
        with pytest.raises(QLIPError, match="give numbers such as"):
            chosen_rows(wrong, 5, "d")


def test_tokens_verify__names_the_shard_of_a_damaged_part(qlip: Command, pictures: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pictures, tmp_path / "copy"))
    ran = qlip("tokens", "verify", copy)
    assert (ran.code, ran.out) == (0, f"{copy}: intact; 2 parts, 18 rows, {ran.out.split(', ')[-1]}")
    path = copy / "data/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    ran = qlip("tokens", "verify", copy, "--json")
    (found,) = ran.json["findings"]
    assert ran.code == 1 and not ran.json["intact"]
    assert found["file"] == "data/part-00001.parquet" and "tokenise shard 'pictures 1' again" in found["what"]
    ran = qlip("tokens", "verify", copy)
    assert "1 fault" in ran.out and not ran.error_lines
    assert qlip("tokens", "verify", copy, "--repair").code == 1 and path.read_bytes() == data


def test_tokens_verify__repairs_records(qlip: Command, pictures: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pictures, tmp_path / "copy"))
    path = copy / "manifest/part-00001.json"
    path.unlink()
    ran = qlip("tokens", "verify", copy)
    assert ran.code == 1 and "manifest/part-00001.json: missing, but part 1 is in manifest.jsonl" in ran.out
    assert ran.error_lines == [f"qlip tokens verify {copy} --repair rebuilds the records"]
    ran = qlip("tokens", "verify", copy, "--repair")
    assert ran.code == 0 and "; repaired" in ran.out and "intact" in ran.out
    assert path.read_bytes() == pictures.joinpath("manifest/part-00001.json").read_bytes()


def test_merge_split_and_sample(qlip: Command, tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", seed=1, batch_size=9)
    ran = qlip("tokens", "merge", first.address, second.address, "-o", "m", "--json")
    assert ran.json["results"][0] | {"notes": 0} == {
        "dataset": "m",
        "rows": 30,
        "parts": 6,
        "repeated_keys": 15,
        "notes": 0,
    }
    assert "15 keys in more than one dataset, such as" in ran.err and "they differ: batch_size" in ran.err
    assert qlip("tokens", "merge", first.address, second.address, "-o", "n", "--unique").code == 1
    ran = qlip("tokens", "split", "m", "train=3", "test=1", "--json")
    assert sum(one["rows"] for one in ran.json["results"]) == 30
    assert qlip("tokens", "split", "m", "train").code == 2
    ran = qlip("tokens", "sample", "m", "-n", 4, "--json")
    assert [one["tokens"] for one in ran.json["results"]] == [
        TokenDataset("m").row(one["row"]).tokens.hex() for one in ran.json["results"]
    ]
    assert qlip("tokens", "sample", "m", "-n", 4, "-o", "few").code == 0
    assert TokenDataset("few").keys() == [one["key"] for one in ran.json["results"]]
    ran = qlip("tokens", "info", "m", "--json")
    assert (ran.json["rows"], ran.json["pictures"], ran.json["info"]["batch_size"]) == (30, 30, 8)
    assert "30 in 6 parts" in qlip("tokens", "info", "m").out
    for name in ("m", "few", "train", "test"):
        assert qlip("tokens", "verify", name).code == 0, name
    assert qlip("tokens", "export", "few", "-o", "tars").out == "4 rows in 1 tar in tars\n"


def test_a_sample_as_a_sheet(qlip: Command, pictures: Path) -> None:
    ran = qlip("tokens", "sample", pictures, "-n", 3, "--sheet", "s.jpg")
    assert (ran.code, ran.out) == (0, "") and Image.open("s.jpg").width > 300
    assert "cat" in qlip("tokens", "sample", pictures, "-n", 18).out


def test_what_is_no_dataset(qlip: Command, tmp_path: Path) -> None:
    for command in ("info", "verify", "sample"):
        ran = qlip("tokens", command, tmp_path)
        assert ran.code == 1 and "no token dataset; give a folder that `qlip tokenize` wrote" in ran.err
    ran = qlip("tokens", "push", tmp_path, "me/tokens")
    assert ran.code == 1 and len(ran.error_lines) == 1
