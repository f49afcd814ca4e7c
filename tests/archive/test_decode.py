"""Decode a token dataset: the tiles of an image are joined, as `qlip encode --tiles` has them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.archive import TokenDataset, TokenStream
from qlip.archive.dataset.layout import Layout
from qlip.archive.manage.decode import decode_tiled, tiled_images
from qlip.archive.manage.export_webdataset import export
from qlip.archive.manage.merge import merge, sample, split
from qlip.archive.manage.verify import verify
from qlip.cli.main import run
from qlip.errors import QLIPError
from qlip.tokens import Fit, ImageCodec, TokenFile
from qlip.tokens.image_codec import join_images, join_tiles
from tests.cli.conftest import Command
from tests.cli.conftest import qlip as qlip  # the command, as a fixture
from tests.data.samples import make_image

SIZES = {"a": (200, 130), "b": (64, 60), "sub/c": (90, 330), "d": (10, 10)}
"""(width, height) of each image, which come in the order of their names."""
TILES = {"a": (2, 3), "b": (1, 1), "d": (1, 1), "sub/c": (5, 1)}
"""Their (rows, columns)."""


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec.from_pretrained("bundled", device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        make_image(number, size).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A dataset of tiles, made in batches of 5."""
    folder = tmp_path_factory.mktemp("tiles") / "tokens"
    command = ["tokenize", str(images), "-o", str(folder), "--tiles", "--embeddings", "--batch-size", "5"]
    assert run([*command, "--workers", "0"]) == 0
    return folder


def test_dataset_of_tiles__has_a_row_per_tile(tiles: Path, codec: ImageCodec) -> None:
    dataset = TokenDataset(tiles)
    assert (dataset.info.views.fit, dataset.info.views.tile, dataset.info.grid) == ("tiles", 64, (8, 8))
    assert dataset.info.preparation == codec.processor.preprocessing.fingerprint("tiles")
    wanted = [(f"{key}.png", view) for key, (rows, columns) in TILES.items() for view in range(rows * columns)]
    rows = dataset.rows(range(len(dataset)))
    assert [(row.key, row.view) for row in rows] == wanted
    assert all(dataset.info.views.tiles_of(row.original_size) == TILES[row.key[:-4]] for row in rows)
    assert [(one.key, len(one.rows), one.tiles, one.complete) for one in tiled_images(dataset)] == [
        (f"{key}.png", count[0] * count[1], count, True) for key, count in TILES.items()
    ]
    assert verify(dataset.layout).intact
    batch = next(iter(TokenStream(dataset, batch_size=8, seed=0)))
    assert batch.indices.shape == (8, 64, 4)  # type: ignore[union-attr]


def test_dataset_of_tiles__has_the_tokens_of_its_batches(tiles: Path, images: Path, codec: ImageCodec) -> None:
    """Rows are what the model makes of the tiles of `ImageCodec`, five at a time across images."""
    dataset = TokenDataset(tiles)
    parts = []
    for name in TILES:
        prepared = codec.prepare(images / f"{name}.png", Fit("tiles"))
        assert prepared.tiles == TILES[name]
        parts += [
            prepared.pixels[:, top : top + 64, left : left + 64]
            for top in range(0, prepared.image.height, 64)
            for left in range(0, prepared.image.width, 64)
        ]
    with torch.inference_mode():
        expected = torch.cat([codec.model.encode(batch) for batch in torch.stack(parts).split(5)])
    assert torch.equal(dataset[:], expected)


def test_decode_tiled__is_the_codecs_image_of_the_same_batches(tiles: Path, images: Path, codec: ImageCodec) -> None:
    dataset = TokenDataset(tiles)
    found = tiled_images(dataset)
    joined = dict(decode_tiled(dataset, found, codec.model, codec.processor, batch_size=5))
    with torch.inference_mode():
        rebuilt = [
            image
            for batch in dataset[:].split(5)
            for image in codec.processor.to_images(codec.model.decode(batch, (8, 8)))
        ]
    for one, image in joined.items():
        assert image == join_images(rebuilt[one.rows.start : one.rows.stop], one.tiles)
        assert image.size == (64 * one.tiles[1], 64 * one.tiles[0])


def test_decode__of_one_image_is_encode_and_decode_to_the_pixel(qlip: Command, images: Path) -> None:
    """With one image the batches of both ways are the same."""
    Path("one").mkdir()
    (Path("one") / "a.png").write_bytes((images / "a.png").read_bytes())
    for options in ([], ["--size", 100, 300]):
        place = f"{len(options)}"
        assert qlip("tokenize", "one", "-o", f"t{place}", "--tiles", *options, "--batch-size", 4).code == 0
        assert qlip("decode", f"t{place}", "-o", f"joined{place}", "--batch-size", 4).code == 0
        assert qlip("encode", "one", "-o", f"e{place}", "--fit", "tiles", *options, "--batch-size", 4).code == 0
        assert qlip("decode", f"e{place}", "-o", f"alone{place}", "--batch-size", 4).code == 0
        joined, alone = (Image.open(Path(f"{name}{place}", "a.png")) for name in ("joined", "alone"))
        assert joined.size == ((192, 128), (320, 128))[bool(options)] and joined == alone
        export(TokenDataset(f"t{place}"), f"tars{place}")
        with tarfile.open(Path(f"tars{place}", "part-00000.tar")) as tar:
            names = [member.name for member in tar]
            content = tar.extractfile("a.qlip").read()  # type: ignore[union-attr]
        assert names == ["a.qlip", "a.json"] and content == Path(f"e{place}", "a.qlip").read_bytes()


def test_decode__joins_tiles_and_shows_single_ones(qlip: Command, tiles: Path) -> None:
    ran = qlip("decode", tiles, "-o", "out", "--json")
    assert ran.code == 0 and (ran.json["written"], ran.json["skipped"]) == (4, 0)
    found = {str(path.relative_to("out"))[:-4]: Image.open(path).size for path in Path("out").rglob("*.png")}
    assert found == {key: (64 * columns, 64 * rows) for key, (rows, columns) in TILES.items()}
    Path("out/a.png").unlink()
    ran = qlip("decode", tiles, "-o", "out", "--skip-existing", "--json")
    assert (ran.json["written"], ran.json["skipped"]) == (1, 3)
    whole = Image.open("out/a.png")
    assert qlip("decode", tiles, "-o", "rows", "--rows", "4,6").code == 0
    assert {path.name for path in Path("rows").iterdir()} == {"a-4.png", "b-0.png"}
    tile, box = Image.open("rows/a-4.png"), whole.crop((64, 64, 128, 128))  # second row, second column
    assert np.abs(np.asarray(tile, int) - np.asarray(box, int)).max() <= 1  # of another batch
    assert qlip("decode", tiles, "-o", "some", "--limit", 2, "--original-size").code == 0
    drawn = [Image.open(path) for path in Path("some").rglob("*.png")]
    assert len(drawn) == 2 and {one.size for one in drawn} <= {(195, 130), (64, 64), (60, 60), (10, 10), (66, 330)}
    ran = qlip("decode", tiles, "--sheet", "sheet.png", "--json")
    assert ran.code == 0 and ran.json["sheet"]["images"] == 13  # tiles
    assert "tiles of 64 x 64" in qlip("tokens", "info", tiles).out
    assert "several (tiles of 64 x 64)" in (tiles / "README.md").read_text()


def test_decode__names_images_that_lack_tiles(qlip: Command, tiles: Path) -> None:
    dataset = TokenDataset(tiles)
    sample(dataset, Layout("few"), 9, seed=1)
    few = TokenDataset("few")
    assert verify(few.layout).intact
    incomplete = [one for one in tiled_images(few) if not one.complete]
    assert incomplete and sum(len(one.rows) for one in tiled_images(few)) == 9
    ran = qlip("decode", "few", "-o", "out", "--json")
    assert ran.code == 1 and {one["input"] for one in ran.json["failures"]} == {one.key for one in incomplete}
    assert all("--rows shows them one by one" in one["error"] for one in ran.json["failures"])
    assert ran.json["written"] == len(tiled_images(few)) - len(incomplete)
    with pytest.raises(QLIPError, match="has not all of its tiles"):
        export(few, "tars")


def test_search__finds_the_best_tile_of_each_image(qlip: Command, tiles: Path) -> None:
    ran = qlip("search", tiles, "--like", "a.png", "-k", 3, "--no-image", "--json")
    assert ran.code == 0
    assert sorted(one["key"] for one in ran.json["results"]) == ["b.png", "d.png", "sub/c.png"]


def test_split_and_merge__keep_the_tiles_of_an_image_together(tiles: Path, tmp_path: Path) -> None:
    shares = {str(tmp_path / "left"): 1.0, str(tmp_path / "right"): 1.0}
    split(Layout(str(tiles)), shares, seed=2)
    halves = [tiled_images(TokenDataset(address)) for address in shares]
    assert all(halves) and all(one.complete for half in halves for one in half)
    merged = Layout(str(tmp_path / "merged"))
    merge([Layout(address) for address in shares], merged)
    found = tiled_images(TokenDataset(merged.address))
    assert verify(merged).intact and {one.key: one.tiles for one in found} == {
        f"{key}.png": count for key, count in TILES.items()
    }
    assert all(one.complete for one in found)
    twice = Layout(str(tmp_path / "twice"))
    merge([merged, Layout(str(tiles))], twice)
    assert [one.complete for one in tiled_images(TokenDataset(twice.address))] == [True] * 8


def test_merge__refuses_tiles_with_other_views(qlip: Command, tiles: Path, images: Path) -> None:
    assert qlip("tokenize", images, "-o", "square", "--embeddings").code == 0
    assert qlip("tokenize", images, "-o", "sized", "--tiles", "--size", 128, 128, "--embeddings").code == 0
    for other, named in (("square", "one, square"), ("sized", "tiles of 64 x 64, together near 128 x 128")):
        ran = qlip("tokens", "merge", other, tiles, "-o", "merged")
        assert ran.code == 1 and f"{tiles}: views tiles of 64 x 64, and " in ran.err
        assert f"{other} has {named}; tiles go together only with tiles" in ran.err
        assert not Path("merged").exists()


def test_tokenize__refuses_crops_of_tiles_and_too_many_tiles(qlip: Command, images: Path) -> None:
    for crops in ("flip", "ten"):
        ran = qlip("tokenize", images, "-o", "out", "--tiles", "--crops", crops)
        assert ran.code == 2 and "tiles are neither cropped nor mirrored" in ran.err
    ran = qlip("tokenize", images, "-o", "out", "--tiles", "--size", 4096, 4160)
    assert ran.code == 1 and "64 x 65 tiles of 64 x 64 pixels, and an image may have 4,096" in ran.err
    assert qlip("tokenize", images, "-o", "out", "--tiles", "--fit", "keep-aspect").code == 2
    assert not Path("out").exists()


def test_tokenize__forecasts_tiles_by_the_images_that_it_saw(qlip: Command, images: Path, tiles: Path) -> None:
    report = qlip("tokenize", images, "-o", "out", "--tiles", "--batch-size", 5, "--dry-run", "--json").json
    assert (report["images"], report["sampled"]) == (4, 4)
    assert 13 * 224 < report["bytes"] < 13 * 300
    (entry,) = [json.loads(line) for line in (tiles / "manifest.jsonl").read_text().splitlines()]
    assert (entry["inputs"], entry["rows"]) == (4, 13)


def test_token_file__of_joined_rows_is_the_codecs(tiles: Path, images: Path, codec: ImageCodec) -> None:
    dataset = TokenDataset(tiles)
    for one in tiled_images(dataset):
        whole = join_tiles(dataset.batch(one.rows), one.tiles, (8, 8))
        [file] = codec.encode([images / one.key], fit="tiles")
        assert isinstance(file, TokenFile) and (file.tiles, file.grid) == (
            one.tiles,
            (8 * one.tiles[0], 8 * one.tiles[1]),
        )
        different = (whole != file.indices(7)).float().mean()
        assert different < 0.02  # the batches are others: floats, and so rarely a bit, depend on them
