"""IndexedShards: index files are used where they exist, and refused if they are stale."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from qlip.data import RawSample, TarImages, batches
from qlip.data.config import DataConfig
from qlip.data.image_feed import open_stream
from qlip.data.shards.build_index import build_index
from qlip.data.shards.shard_index import ShardIndex
from qlip.data.storage.retry import RetryPolicy, StorageError
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, validate
from qlip.modeling import Preprocessing

from ..objects import QUICK, ObjectServer
from ..samples import everything, index_all, shard, tars, tokenize


def rewritten_smaller(path: Path) -> None:
    shard(path, range(3))


def rewritten_in_another_order(path: Path) -> None:
    size = path.stat().st_size
    shard(path, reversed(range(8)))
    assert path.stat().st_size == size


def index_of_another(path: Path) -> None:
    other = shard(path.with_name("other.tar"), range(100, 108))
    index_all(other)
    Path(f"{other}.index").replace(f"{path}.index")


@pytest.mark.parametrize("change", [rewritten_smaller, rewritten_in_another_order, index_of_another])
def test_indexed_shards__a_stale_index_is_refused_and_rebuilt_on_demand(tmp_path: Path, change: object) -> None:
    path = shard(tmp_path / "x.tar", range(8))
    index_all(path)
    change(path)  # type: ignore[operator]
    with pytest.raises(StorageError) as caught:
        TarImages(path)
    wanted = "x.tar: its index belongs to another tar, or the tar changed; make it again with `qlip data index`"
    assert str(caught.value).endswith(wanted)
    assert build_index(str(path), Storage()).made
    assert everything(TarImages(path)) == everything_walked(path)


def everything_walked(path: Path) -> list[RawSample]:
    Path(f"{path}.index").unlink()
    return everything(TarImages(path))


def test_indexed_shards__a_shard_that_changes_ends_the_run_and_is_no_broken_sample(tmp_path: Path) -> None:
    """Same size, same first and last sample: only the read of what moved can tell, and does."""
    path = shard(tmp_path / "x.tar", range(6))
    index_all(path)
    shard(path, [0, 2, 1, 4, 3, 5])
    config = validate(DataConfig, {"sources": [{"path": str(path)}]}, "r")
    stream = open_stream(config, 0, Preprocessing((8, 8), None), tokenize)
    with pytest.raises(QLIPError, match="its index belongs to another tar"):
        next(batches(stream, 6))


def test_indexed_shards__pickle_small(tmp_path: Path) -> None:
    index = ShardIndex.from_groups(0, [], "x")
    assert len(index) == 0 and index.to_bytes()
    source = tars(tmp_path, 40)
    index_all(*source.shards)
    assert len(pickle.dumps(TarImages(source.shards))) < len(pickle.dumps(source)) / 2


def test_indexed_shards__a_remote_index_is_copied_to_the_cache(server: ObjectServer) -> None:
    local = tars(server.folder, 40)
    index_all(*local.shards)
    address = f"{server.address}/tars-{{00..01}}.tar"
    assert everything(TarImages(address, retry=QUICK)) == everything(local)
    server.requests.clear()
    assert everything(TarImages(address, retry=QUICK)) == everything(local)
    heads = [request for request in server.gets() if request.path.endswith(".index")]
    assert [request.span for request in heads] == [(0, 4096)] * 2
    shard(server.folder / "tars-01.tar", range(20, 35))  # renewed with its index: a copy of the old one does no harm
    index_all(server.folder / "tars-01.tar")
    assert everything(TarImages(address, retry=QUICK)) == everything(TarImages(local.shards))


def test_indexed_shards__a_stale_remote_index_is_refused(server: ObjectServer, tmp_path: Path) -> None:
    tars(server.folder, 40)
    into = str(tmp_path / "indexes")
    index_all(f"{server.address}/tars-00.tar", f"{server.address}/tars-01.tar", into=into)
    shard(server.folder / "tars-01.tar", range(50, 90))
    remote = TarImages(f"{server.address}/tars-{{00..01}}.tar", index=into, retry=QUICK)
    remote.read(3)
    with pytest.raises(StorageError, match=r"tars-01.tar: its index belongs to another tar"):
        remote.read(33)
    shard(server.folder / "tars-00.tar", range(50, 90))
    with pytest.raises(StorageError, match=r"tars-00.tar: its index belongs to another tar"):
        TarImages(f"{server.address}/tars-{{00..01}}.tar", index=into, retry=QUICK)


def test_indexed_shards__an_index_folder_must_hold_all(server: ObjectServer, tmp_path: Path) -> None:
    tars(server.folder, 4)
    with pytest.raises(QLIPError, match=r"no index of .*tars-00.tar there; make it with `qlip data index .* -o "):
        TarImages(f"{server.address}/tars-00.tar", index=str(tmp_path / "nowhere"), retry=QUICK)
    with pytest.raises(QLIPError, match="have the same name; use an index folder per folder of shards"):
        TarImages([f"{server.address}/a/x.tar", f"{server.address}/b/x.tar"], index=str(tmp_path), retry=QUICK)


@pytest.mark.parametrize("fault", ["404", "403", "503"])
def test_indexed_shards__names_an_unreachable_shard(server: ObjectServer, tmp_path: Path, fault: str) -> None:
    index_all(*tars(server.folder, 4).shards)
    server.fault = lambda request: fault
    messages = {"404": "no index beside it", "403": "no permission", "503": "gave up after 2 tries"}
    with pytest.raises(QLIPError, match=messages[fault]):
        TarImages(f"{server.address}/tars-00.tar", retry=RetryPolicy(tries=2, longest_wait=0.01))
