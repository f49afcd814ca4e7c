"""Datasets on the command line: looked at, verified, merged, split, sampled, exported, and decoded to images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from qlip.archive.dataset.dataset import TokenDataset
from tests.archive.made import bundled_dataset, made
from tests.cli.conftest import Command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(bundled_dataset(tmp_path_factory.mktemp("bundled") / "tokens").address)


def test_tokens_verify__names_the_shard_of_a_damaged_part(qlip: Command, dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    ran = qlip("tokens", "verify", copy)
    assert (ran.code, ran.out) == (0, f"{copy}: intact; 2 parts, 18 rows, {ran.out.split(', ')[-1]}")
    path = copy / "data/part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    ran = qlip("tokens", "verify", copy, "--json")
    (found,) = ran.json["findings"]
    assert ran.code == 1 and not ran.json["intact"]
    assert found["file"] == "data/part-00001.parquet" and "tokenise shard 'images 1' again" in found["what"]
    ran = qlip("tokens", "verify", copy)
    assert "1 fault" in ran.out and not ran.error_lines
    assert qlip("tokens", "verify", copy, "--repair").code == 1 and path.read_bytes() == data


def test_tokens_verify__repairs_records(qlip: Command, dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    path = copy / "manifest/part-00001.json"
    path.unlink()
    ran = qlip("tokens", "verify", copy)
    assert ran.code == 1 and "manifest/part-00001.json: missing, but part 1 is in manifest.jsonl" in ran.out
    assert ran.error_lines == [f"qlip tokens verify {copy} --repair rebuilds the records"]
    ran = qlip("tokens", "verify", copy, "--repair")
    assert ran.code == 0 and "; repaired" in ran.out and "intact" in ran.out
    assert path.read_bytes() == dataset.joinpath("manifest/part-00001.json").read_bytes()


def test_tokens__merge_split_and_sample(qlip: Command, tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", seed=1, batch_size=9)
    ran = qlip("tokens", "merge", first.address, second.address, "-o", "m", "--json")
    assert ran.json["results"][0] | {"notes": 0} == {
        "dataset": "m",
        "rows": 30,
        "parts": 6,
        "repeated_keys": 15,
        "notes": 0,
    }
    assert "15 keys in more than one dataset, such as" in ran.err and "the datasets differ: batch_size" in ran.err
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
    assert (ran.json["rows"], ran.json["images"], ran.json["info"]["batch_size"]) == (30, 30, 8)
    assert "30 in 6 parts" in qlip("tokens", "info", "m").out
    for name in ("m", "few", "train", "test"):
        assert qlip("tokens", "verify", name).code == 0, name
    assert qlip("tokens", "export", "few", "-o", "tars").out == "4 rows in 1 tar in tars\n"


def test_tokens_sample__sheet(qlip: Command, dataset: Path) -> None:
    ran = qlip("tokens", "sample", dataset, "-n", 3, "--sheet", "s.jpg")
    assert (ran.code, ran.out) == (0, "") and Image.open("s.jpg").width > 300
    assert "cat" in qlip("tokens", "sample", dataset, "-n", 18).out


def test_tokens__folder_without_dataset(qlip: Command, tmp_path: Path) -> None:
    for command in ("info", "verify", "sample"):
        ran = qlip("tokens", command, tmp_path)
        assert ran.code == 1 and "no token dataset; give a folder that `qlip tokenize` wrote" in ran.err
    ran = qlip("tokens", "push", tmp_path, "me/tokens")
    assert ran.code == 1 and len(ran.error_lines) == 1
