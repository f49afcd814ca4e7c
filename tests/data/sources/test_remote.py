"""Remote sources: the samples of a local copy, for few requests, ahead of time, through failures."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip.data import Batch, FolderImages, TarImages, TrainingStream, batches
from qlip.data.config import DataConfig, SourceConfig
from qlip.data.image_feed import open_stream
from qlip.data.loader.sampler import cut_blocks
from qlip.data.shards.build_index import build_index
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, validate
from qlip.modeling import Preprocessing

from ..objects import QUICK, ObjectServer, serving
from ..samples import encoded, folder, shard, tokenize

COUNTS = (30, 23, 41, 26)


BLOCKS = {"order": "blocks", "block_size": 8, "window": 3}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "objects").mkdir()
    for number, count in enumerate(COUNTS):
        path = shard(tmp_path / "objects" / f"s-{number}.tar", range(100 * number, 100 * number + count))
        build_index(str(path), Storage())
    with serving(tmp_path / "objects") as found:
        yield found


def stream_of(where: str, **values: Any) -> TrainingStream:
    data: dict[str, Any] = {"sources": [{"path": f"{where}/s-{{0..3}}.tar"} | values]}
    if where.startswith("http"):
        data["store"] = {"tries": 12, "timeout": 0.5, "longest_wait": 0.02}
    return open_stream(validate(DataConfig, data, "r"), 3, Preprocessing((4, 4), None), tokenize)


def numbers(batch: Batch) -> list[str]:
    return [key.rpartition("/")[2] for key in batch.keys]


def of_tars(server: ObjectServer) -> list[tuple[str, tuple[int, int] | None]]:
    return [(request.path, request.span) for request in server.gets() if request.path.endswith(".tar")]


def test_tar_images__a_pass_in_blocks_costs_one_request_per_block(server: ObjectServer) -> None:
    near, far = stream_of(str(server.folder), **BLOCKS), stream_of(server.address, **BLOCKS)
    server.requests.clear()
    row = batches(far, 10)
    seen = [key for batch in itertools.islice(row, 12) for key in numbers(batch)]
    assert len(set(seen)) == sum(COUNTS) == 120
    asked = of_tars(server)
    blocks = len(cut_blocks(COUNTS, 8)[0])
    assert len(set(asked)) == len(set(asked[:blocks])) == blocks
    assert len(asked) <= blocks + 2 * 3  # those of the next pass's first windows, read ahead
    assert len(seen) == 120 and sorted(seen) == sorted(
        key for batch in itertools.islice(batches(near, 10), 12) for key in numbers(batch)
    )


def test_tar_images__the_order_does_not_depend_on_the_storage(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for values in ({}, BLOCKS):
        far = stream_of(server.address, **values)
        near = stream_of(str(server.folder), **values)
        for stream in (near, far):  # orders are drawn from the source's name, which is its path
            stream.sources[0].images.name = "same"
            stream.mixture = stream._mixture()
        for one, other in itertools.islice(zip(batches(near, 16), batches(far, 16), strict=False), 10):
            assert one.keys == other.keys and one.captions == other.captions
            assert torch.equal(one.pixel_values, other.pixel_values)


def test_tar_images__single_samples_cost_a_request_each_in_parallel(server: ObjectServer) -> None:
    far = stream_of(server.address)
    server.requests.clear()
    row = batches(far, 12)
    next(row)
    until = time.monotonic() + 30
    while len(of_tars(server)) == 12 and time.monotonic() < until:
        time.sleep(0.005)
    row.close()  # type: ignore[attr-defined]
    assert 12 < len(of_tars(server)) <= 24  # its own, and those of the next batch, begun ahead
    assert len(set(of_tars(server))) == len(of_tars(server))


def test_tar_images__cached_blocks_are_bounded(server: ObjectServer) -> None:
    far = stream_of(server.address, **BLOCKS)
    images = far.sources[0].images
    assert isinstance(images, TarImages)
    for _ in itertools.islice(batches(far, 5), 40):
        assert images._prefetcher is not None and len(images._prefetcher._spans) <= 2 * 3 + 1


@pytest.mark.parametrize("values", [{}, BLOCKS])
def test_tar_images__failures_change_no_batch_and_are_counted(server: ObjectServer, values: dict[str, Any]) -> None:
    expected = [
        (batch.keys, batch.pixel_values.clone())
        for batch in itertools.islice(batches(stream_of(server.address, **values), 9), 8)
    ]
    draw = random.Random(3)
    server.fault = lambda request: draw.choice(["500", "503", "drop", "cut", "short", None, None, None, None])
    retries = 0
    for batch, (keys, pixels) in zip(batches(stream_of(server.address, **values), 9), expected, strict=False):
        assert batch.keys == keys and torch.equal(batch.pixel_values, pixels) and not batch.skipped
        retries += batch.retries
    assert retries > 5


def test_tar_images__workers_retry_too(server: ObjectServer) -> None:
    expected = [batch.keys for batch in itertools.islice(batches(stream_of(server.address, **BLOCKS), 9), 6)]
    draw = random.Random(4)
    server.fault = lambda request: draw.choice(["500", "cut", None, None])
    row = batches(stream_of(server.address, **BLOCKS), 9, num_workers=2, prefetch=2)
    found = list(itertools.islice(row, 6))
    server.fault = lambda request: "503"
    assert [batch.keys for batch in found] == expected and sum(batch.retries for batch in found) > 3
    with pytest.raises(QLIPError) as caught:  # what a worker says of its store is one line
        for _ in range(60):
            next(row)
    assert "gave up after 12 tries" in str(caught.value) and "\n" not in str(caught.value)


def test_data_config__store_needs_a_remote_source() -> None:
    with pytest.raises(QLIPError, match="'store' goes with sources of an address such as s3://; remove it"):
        validate(DataConfig, {"sources": [{"path": "x.tar"}], "store": {"tries": 3}}, "r")
    with pytest.raises(QLIPError, match=r"unknown key 'store.trys' \(did you mean 'tries'\?\)"):
        validate(DataConfig, {"sources": [{"path": "s3://x.tar"}], "store": {"trys": 3}}, "r")


def test_tar_images__an_address_with_a_query(server: ObjectServer) -> None:
    source = SourceConfig(path=f"{server.address}/s-0.tar?signature=a/b.c", index=str(server.folder))
    assert source.streaming is False
    with pytest.raises(QLIPError, match="no such file"):  # the test's server takes the query for a part of the name
        source.open(RetryPolicy(tries=1))


def test_folder_images__a_remote_folder_equals_the_local_one(tmp_path: Path) -> None:
    """Files beside the images, and a table."""
    local = folder(tmp_path / "f", 7)
    (tmp_path / "f" / "sub").mkdir()
    (tmp_path / "f" / "sub" / "x.png").write_bytes(encoded(50))
    (tmp_path / "f" / "sub" / "x.json").write_text('{"caption": "deep"}')
    (tmp_path / "f" / ".hidden.png").write_bytes(encoded(51))
    storage = Storage(QUICK)

    def copy(name: str) -> None:
        for path in sorted((tmp_path / "f").rglob("*")):
            if path.is_file():
                storage.write(f"memory://{name}/{path.relative_to(tmp_path / 'f').as_posix()}", path.read_bytes())

    copy("folder")
    local = FolderImages(tmp_path / "f")
    far = SourceConfig(path="memory://folder").open()
    assert isinstance(far, FolderImages) and far.remote
    assert [far.read(n) for n in range(len(far))] == [local.read(n) for n in range(len(local))] and len(far) == 8
    (tmp_path / "f" / "captions.csv").write_text("image,caption\nsub/x.png,of the table\n")
    copy("table")
    assert [SourceConfig(path="memory://table").open().read(0)] == [FolderImages(tmp_path / "f").read(0)]
    with pytest.raises(QLIPError, match="memory://nothing: no such folder"):
        SourceConfig(path="memory://nothing").open()
