"""A shard to batches and rows: equal for any number of threads, no image lost, errors listed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.archive.dataset.schema import Views
from qlip.archive.tokenize.encoder import Encoder, describe
from qlip.archive.tokenize.inputs import InputShard, find
from qlip.archive.tokenize.preprocess import POSITION, ReadyBatch, ShardEnd, Work, batches_of, table_of
from qlip.archive.tokenize.url_list import Fetching
from qlip.data.storage import retry
from qlip.data.storage.retry import DeniedError
from qlip.modeling import load_image
from qlip.modeling.processor import Preprocessing
from qlip.tokens import pack
from tests.archive.made import info
from tests.cli.conftest import save_checkpoint
from tests.data.objects import denying_store
from tests.data.samples import encoded, write_tar

OWN = Preprocessing((32, 32), 32, patch_size=8)
SIZES = [(40, 32), (32, 64), (33, 90), (64, 64), (300, 32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "one", seed=0)


def image_shard(path: Path, count: int = 11, broken: tuple[int, ...] = ()) -> InputShard:
    """A shard of images of several sizes."""
    files = []
    for number in range(count):
        data = encoded(number, size=SIZES[number % len(SIZES)])
        files.append((f"{number:03d}.png", data[: len(data) // 2] if number in broken else data))
        files.append((f"{number:03d}.json", f'{{"caption": "number {number}", "label": "l{number % 2}"}}'.encode()))
    (shard,) = find(str(write_tar(path, files))).shards
    return shard


def work(views: Views, batch_size: int = 3, captions: bool = True) -> Work:
    return Work(info(views=views, batch_size=batch_size, captions=captions, grid=None), "no model", OWN)


def all_of(shard: InputShard, given: Work, threads: int = 1) -> tuple[list[ReadyBatch], ShardEnd]:
    *batches, end = batches_of(shard, given, threads)
    assert isinstance(end, ShardEnd) and all(isinstance(batch, ReadyBatch) for batch in batches)
    return batches, end  # type: ignore[return-value]


@pytest.mark.parametrize(
    "views", [Views(), Views(fit="keep-aspect"), Views(crops="ten"), Views(fit="keep-aspect", crops="flip")]
)
def test_batches_of__every_view_once_with_any_number_of_threads(tmp_path: Path, views: Views) -> None:
    shard = image_shard(tmp_path / "s.tar")
    batches, end = all_of(shard, work(views))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted((row.position, row.view) for row in rows) == [(p, v) for p in range(11) for v in range(views.count)]
    assert [batch.number for batch in batches] == list(range(len(batches))) and end.batches == len(batches)
    assert all(len(batch.pixels) == len(batch.rows) <= 3 for batch in batches)
    if views.fit == "square":  # all full but the last
        assert [len(batch.rows) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    others, other_end = all_of(shard, work(views), threads=3)
    assert other_end == end and [batch.rows for batch in others] == [batch.rows for batch in batches]
    assert all(np.array_equal(one.pixels, two.pixels) for one, two in zip(batches, others, strict=True))


def tiled(batch_size: int = 3) -> Work:
    views = Views(fit="tiles", tile=32)
    return Work(info(views=views, batch_size=batch_size, grid=(4, 4)), "no model", OWN)


def test_tiles__of_all_images_fill_batches_with_any_number_of_threads(tmp_path: Path) -> None:
    shard, counts = image_shard(tmp_path / "s.tar"), [1, 2, 3, 4, 9]
    batches, end = all_of(shard, tiled())
    rows = [(row.position, row.view) for batch in batches for row in batch.rows]
    assert rows == [(place, view) for place in range(11) for view in range(counts[place % 5])]
    assert [len(batch.rows) for batch in batches[:-1]] == [3] * (-(-len(rows) // 3) - 1) and end.inputs == 11
    for threads in (2, 3):
        others, other_end = all_of(shard, tiled(), threads)
        assert other_end == end and [batch.rows for batch in others] == [batch.rows for batch in batches]
        assert all(np.array_equal(one.pixels, two.pixels) for one, two in zip(batches, others, strict=True))


def test_tiles__too_many_of_them_skip_their_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip.archive.tokenize.crops.MAX_TILES", 4)
    batches, end = all_of(image_shard(tmp_path / "s.tar"), tiled())
    assert [error.key for error in end.errors] == ["004", "009"] and end.inputs == 11
    assert end.errors[0].reason == (
        "1 x 9 tiles of 32 x 32 pixels, and an image may have 4; choose a smaller size to work at"
    )
    assert {row.position for batch in batches for row in batch.rows} == set(range(11)) - {4, 9}


def test_tiles__sums_that_are_wrong_are_no_part(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(fit="tiles"), batch_size=4)
    assert (given.info.views.tile, given.info.grid) == (32, (4, 4))
    shard, encoder = image_shard(tmp_path / "s.tar", broken=(3,)), Encoder(given)
    batches, end = all_of(shard, given)
    tables = [encoder(batch) for batch in batches]
    table = table_of(given.info, tables, end, "s")
    assert table.num_rows == 2 * 19 + 1 - 4 and table.schema.field("view").type == pa.uint16()
    for wrong in (tables[1:], tables[:-1], [*tables, tables[0]]):
        with pytest.raises(QLIPError, match="s: .* do not add up to its 11 images"):
            table_of(given.info, wrong, end, "s")


def test_batches_of__bounds_the_number_of_waiting_sizes(tmp_path: Path) -> None:
    files = [(f"{n:03d}.png", encoded(n, size=(32, 32 + 8 * n))) for n in range(40)]
    (shard,) = find(str(write_tar(tmp_path / "s.tar", files))).shards
    given, read, largest = work(Views(fit="keep-aspect"), batch_size=2), 0, 0
    for found in batches_of(shard, given):
        if isinstance(found, ReadyBatch):
            largest = max(largest, found.rows[-1].position - read)
            read += len(found.rows)
    assert read == 40 and largest <= 17  # images that wait: 8 batches' worth


def test_batches_of__errors_of_images_name_no_local_path(tmp_path: Path) -> None:
    batches, end = all_of(image_shard(tmp_path / "s.tar", broken=(2, 7)), work(Views()))
    assert end.inputs == 11 and [error.key for error in end.errors] == ["002", "007"]
    assert all(error.reason.startswith("broken image (") for error in end.errors)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(1))
    (folder / "b.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes(encoded(1))
    (folder / "c.json").write_text("no json")
    (folder / "d.png").write_bytes(b"")
    (shard,) = find(str(folder)).shards
    (folder / "a.png").unlink()
    batches, end = all_of(shard, work(Views()))
    assert [row.key for row in batches[0].rows] == ["c.png"]  # a broken caption file does not decide over its image
    assert [error.key for error in end.errors] == ["a.png", "b.png", "d.png"]
    reasons = [error.reason for error in end.errors]
    assert reasons[0] == "No such file or directory" and reasons[1].startswith("not an image that can be read")
    assert len(end.text_faults) == 1 and "c.json: not valid json" in end.text_faults[0]
    assert str(tmp_path) not in " ".join(reasons)  # these are stored in the dataset


def test_batches_of__leaves_captions_out(tmp_path: Path) -> None:
    shard = image_shard(tmp_path / "s.tar", 2)
    batches, _ = all_of(shard, work(Views()))
    assert [(row.captions, row.label) for row in batches[0].rows] == [(("number 0",), "l0"), (("number 1",), "l1")]
    batches, _ = all_of(shard, work(Views(), captions=False))
    assert [(row.captions, row.label) for row in batches[0].rows] == [((), None)] * 2


def test_encoder__tokens_and_embeddings_of_one_forward_pass(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(), batch_size=4, embeddings=True)
    shard = image_shard(tmp_path / "s.tar")
    encoder = Encoder(given)
    passes: list[int] = []
    encoder.model.vision_model.encoder.register_forward_hook(lambda *_: passes.append(1))
    batches, end = all_of(shard, given)
    table = table_of(given.info, [encoder(batch) for batch in batches], end, shard.name)
    assert len(passes) == len(batches) == 3
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [f"{n:03d}" for n in range(11)]
    assert rows[1]["original_size"] == [32, 64] and rows[1]["grid"] == [4, 4] and rows[1]["captions"] == ["number 1"]
    tokenizer, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    with shard.opened() as (images, positions), torch.inference_mode():
        for start in range(0, 11, 4):  # a plain loop over the same batches
            raws = [images.read(position) for position in positions[start : start + 4]]
            pixels = processor([load_image(raw.image) for raw in raws])["pixel_values"]
            embeds = tokenizer(pixels).image_embeds.numpy().astype(np.float16)
            for row, indices, embed in zip(rows[start:], tokenizer.encode(pixels), embeds, strict=False):
                assert row["tokens"] == pack(indices, tokenizer.group_size)
                assert np.array_equal(np.array(row["embedding"], np.float16), embed)
    without = describe(str(model), Views(), batch_size=4)
    assert without.info.embedding_dim is without.info.text_fingerprint is None
    plain = Encoder(without)
    tables = [plain(batch) for batch in batches]
    assert pa.concat_tables(tables)["tokens"].to_pylist() == [row["tokens"] for row in rows]


def test_encoder__keep_aspect_has_different_grids(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(fit="keep-aspect"), batch_size=4)
    assert given.info.grid is None and given.info.token_bytes is None
    shard, encoder = image_shard(tmp_path / "s.tar"), Encoder(given)
    batches, end = all_of(shard, given)
    table = table_of(given.info, [encoder(batch) for batch in reversed(batches)], end, shard.name)
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [f"{n:03d}" for n in range(11)]  # in order, whatever came first
    assert [row["grid"] for row in rows[:5]] == [[4, 5], [8, 4], [10, 4], [4, 4], [4, 37]]
    assert [len(row["tokens"]) for row in rows[:2]] == [4 * 5 * 20 // 8, 8 * 4 * 20 // 8]


def test_table_of__refuses_wrong_counts(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(crops="flip"), batch_size=4)
    shard, encoder = image_shard(tmp_path / "s.tar", broken=(3,)), Encoder(given)
    batches, end = all_of(shard, given)
    tables = [encoder(batch) for batch in batches]
    assert table_of(given.info, tables, end, "s").num_rows == 20
    assert POSITION in tables[0].schema.names and POSITION not in table_of(given.info, tables, end, "s").schema.names
    for wrong in (tables[1:], [*tables, tables[0]]):
        with pytest.raises(QLIPError, match="s: .* do not add up to its 11 images"):
            table_of(given.info, wrong, end, "s")


def test_table_of__refuses_two_images_with_one_key(tmp_path: Path, model: Path) -> None:
    class Twice:
        """A source whose keys are all one."""

        name, remote = "twice", False

        def __len__(self) -> int:
            return 2

        def key(self, index: int) -> str:
            return "same"

        def read(self, index: int):
            from qlip.data.sources.base import RawSample

            return RawSample(encoded(index), (), None, "same")

        def close(self) -> None:
            return

    given = describe(str(model), Views())
    shard = InputShard("s", Twice)  # type: ignore[arg-type]
    batches, end = all_of(shard, given)
    with pytest.raises(QLIPError, match="two of them have the same key: rename one"):
        table_of(given.info, [Encoder(given)(batch) for batch in batches], end, "s")


def test_encoder__refuses_another_model(tmp_path: Path, model: Path) -> None:
    import shutil

    place = tmp_path / "model"
    shutil.copytree(model, place)
    given = describe(str(place), Views())
    shutil.rmtree(place)
    save_checkpoint(place, seed=5)
    with pytest.raises(QLIPError, match=r"its code fingerprint is \w{12}, the dataset's \w{12}; put the model that"):
        Encoder(given)


def test_batches_of__an_unreachable_server_is_an_image_error_and_an_unreachable_network_a_shard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    from tests.data.objects import serving

    fetching = Fetching(tries=2, timeout=0.5, allow_local=True)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.02)
    (tmp_path / "a.png").write_bytes(encoded(1))
    with serving(tmp_path) as server:
        (tmp_path / "urls.txt").write_text(f"{server.address}/a.png\n{server.address}/b.png\n")
        (shard,) = find(str(tmp_path / "urls.txt"), fetching=fetching).shards
        server.fault = lambda request: "500" if "b.png" in request.path else None
        batches, end = all_of(shard, work(Views()))
        assert len(batches) == 1 and "500" in end.errors[0].reason
        server.fault = lambda request: "500"
        with pytest.raises(QLIPError, match="addresses 0 to 1: none of its 2 images can be fetched .*credentials"):
            all_of(shard, work(Views()))


def test_batches_of__denied_access_on_the_web_and_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    from tests.data.objects import serving

    fetching = Fetching(tries=2, timeout=0.5, allow_local=True)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.02)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded(1))
    with serving(tmp_path) as server:
        (tmp_path / "urls.txt").write_text(f"{server.address}/a.png\n{server.address}/b.png\n")
        (shard,) = find(str(tmp_path / "urls.txt"), fetching=fetching).shards
        server.fault = lambda request: "403" if "b.png" in request.path else None
        batches, end = all_of(shard, work(Views()))
        assert len(batches) == 1
        assert [error.reason for error in end.errors] == [
            "no permission (403 Forbidden); check the credentials for this store"
        ]
        server.fault = lambda request: "403"
        with pytest.raises(QLIPError, match="addresses 0 to 1: none of its 2 images can be fetched .*credentials"):
            all_of(shard, work(Views()))
    with denying_store(tmp_path, "b.png") as address:
        (tmp_path / "urls.txt").write_text(f"{tmp_path}/a.png\n{address}/b.png\n")
        for given in (address, str(tmp_path / "urls.txt")):
            (shard,) = find(given, fetching=fetching).shards
            with pytest.raises(DeniedError, match=f"^{address}/b.png: no permission .Forbidden.; check the credential"):
                all_of(shard, work(Views()))


def test_batches_of__denied_access_to_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded(1))
    (shard,) = find(str(tmp_path / "in")).shards

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qlip.data.sources.base.open", refused, raising=False)
    with pytest.raises(DeniedError, match="in/a.png: Permission denied; give this user the right to read it"):
        all_of(shard, work(Views()))


def test_batches_of__denied_access_to_a_tar(tmp_path: Path) -> None:
    """A store says so of a file that is not there, too, to those who may not list it."""
    write_tar(tmp_path / "s.tar", [("a.png", encoded(1))])
    with denying_store(tmp_path, "s.tar") as address:
        (shard,) = find(f"{address}/s.tar").shards
        with pytest.raises(QLIPError, match="s.tar: no permission") as raised:
            all_of(shard, work(Views()))
    assert not isinstance(raised.value, DeniedError)


def test_encoder__half_precision(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(), batch_size=4, dtype="bfloat16", embeddings=True)
    full = describe(str(model), Views(), batch_size=4, embeddings=True)
    assert given.info.text_fingerprint == full.info.text_fingerprint  # of the stored weights
    assert given.info.code_fingerprint == full.info.code_fingerprint
    shard = image_shard(tmp_path / "s.tar", 3)
    (batch, *_), _ = all_of(shard, given)
    one, two = (
        np.stack([np.frombuffer(data, np.uint8) for data in Encoder(one)(batch)["tokens"].to_pylist()])
        for one in (given, full)
    )
    assert np.unpackbits(one ^ two).mean() < 0.1  # nearly the same bits


def test_to_bytes__round_trip(tmp_path: Path, model: Path) -> None:
    given = describe(str(model), Views(), batch_size=4, embeddings=True)
    (batch, *_), _ = all_of(image_shard(tmp_path / "s.tar", 3), given)
    table, sink = Encoder(given)(batch), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert pa.ipc.open_stream(sink.getvalue()).read_all().equals(table)
