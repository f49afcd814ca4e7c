"""A dataset of .qlip files that exist already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlip import QLIPError, assets
from qlip.archive import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.manage.import_files import import_files
from qlip.archive.manage.verify import verify
from qlip.tokens import ImageCodec, TokenFile
from tests.cli.conftest import Command
from tests.cli.conftest import qlip as qlip  # the command, as a fixture


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec.from_pretrained("bundled", device="cpu")


@pytest.fixture(scope="module")
def files(codec: ImageCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good files, one of them entropy-coded, a damaged one, and one of tiles."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "sub").mkdir()
    images = sorted(assets.path("images").glob("*.jpg"))[:3]
    made = codec.encode(images)
    made[0].save(folder / "a.qlip")
    made[1].save(folder / "b.qlip", codec.coder())
    made[2].save(folder / "sub" / "c.qlip")
    (folder / "broken.qlip").write_bytes(made[0].to_bytes()[:-1])
    codec.encode(images[:1], fit="tiles", size=(64, 128))[0].save(folder / "tiles.qlip")
    (folder / "a.json").write_text(json.dumps({"captions": ["an a", "the a"], "label": "x", "view": 0}))
    (folder / "b.txt").write_text("a b\n")
    (folder / "sub" / "c.json").write_text("not JSON")
    return folder


def test_import_files__rows_are_the_files(files: Path, codec: ImageCodec, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "out"))
    built = import_files(files, layout, codec, files_per_part=2)
    dataset = TokenDataset(layout.address)
    assert (built.rows, built.parts) == (3, 3) and dataset.keys() == ["a", "b", "sub/c"] and not dataset.missing
    for number, name in enumerate(("a", "b", "sub/c")):
        file = TokenFile.from_bytes((files / f"{name}.qlip").read_bytes(), codecs=codec.coders())
        assert torch.equal(dataset[number], file.indices(7)) and dataset.row(number).original_size == file.original_size
    captions, labels = dataset.captions_and_labels(range(3))
    assert (captions, labels) == ([("an a", "the a"), ("a b",), ()], ["x", None, None])
    errors = {one.key: one.reason for entry in layout.manifest() for one in entry.errors}
    assert errors.keys() == {"broken", "tiles"} and "made of tiles" in errors["tiles"]
    assert not verify(layout).findings


def test_import_files__resumes_to_the_same_bytes(files: Path, codec: ImageCodec, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "out"))
    import_files(files, layout, codec, files_per_part=2)
    before = {path: path.read_bytes() for path in Path(layout.address).rglob("*") if path.is_file()}
    Path(layout.entry_path(1)).unlink()
    Path(layout.path("manifest.jsonl")).unlink()
    import_files(files, layout, codec, files_per_part=2)
    assert {path: path.read_bytes() for path in Path(layout.address).rglob("*") if path.is_file()} == before


def test_import_files__a_folder_without_files_of_the_model(files: Path, codec: ImageCodec, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="no .qlip file in it"):
        import_files(tmp_path, Layout(str(tmp_path / "out")), codec)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.qlip").write_bytes(b"x")
    with pytest.raises(QLIPError, match="none of its 1 files can be taken, the first: "):
        import_files(tmp_path / "in", Layout(str(tmp_path / "out")), codec)


def test_tokens_import__command(files: Path, qlip: Command) -> None:
    ran = qlip("tokens", "import", files, "-o", "out")
    assert ran.code == 0 and "2 files could not be taken; out/errors.parquet lists them" in ran.err
    assert len(TokenDataset("out")) == 3
