"""Index files: made once and whole, exact, used where they are, refused where they are another tar's."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from qlip.data import FolderImages, RawSample, TarImages, batches
from qlip.data.config import DataConfig, SourceConfig
from qlip.data.image_feed import open_stream
from qlip.data.shards.build_index import build_index
from qlip.data.shards.shard_index import ShardIndex, scan
from qlip.data.storage.retry import RetryPolicy, StorageError
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, validate

from .objects import QUICK, ObjectServer, serving
from .samples import encoded, folder, shard, tars, tokenize, write_tar


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "objects").mkdir()
    with serving(tmp_path / "objects") as found:
        yield found


def everything(source: TarImages | FolderImages) -> list[RawSample]:
    return [source.read(index) for index in range(len(source))]


def index_all(*shards: Path | str, into: str | None = None) -> None:
    for one in shards:
        build_index(str(one), Storage(QUICK), into)


MIXED = [
    ("a.json", b'{"caption": "apart"}'),
    ("b.png", encoded(1)),
    ("b.txt", b"beside"),
    ("a.png", encoded(2)),
    ("words.txt", b"no picture"),
    ("\u00fc/c.webp", encoded(3, "webp")),
    ("empty.txt", b""),
]


def test_an_index_says_what_a_walk_says(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", MIXED)
    before = everything(TarImages(path))
    made = build_index(str(path), Storage())
    assert made.made and made.samples == 3 and made.index == f"{path}.index"
    assert not build_index(str(path), Storage()).made and build_index(str(path), Storage(), force=True).made
    source = TarImages(path)
    assert everything(source) == before and [raw.key for raw in before] == ["a", "b", "ü/c"]
    assert before[0].captions == ("apart",) and before[1].captions == ("beside",)
    assert not source._indexed._scanned  # the tar was not walked through
    assert everything(pickle.loads(pickle.dumps(source))) == before


def test_an_index_is_a_safetensors_file_of_places(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(5))
    index_all(path)
    content = path.read_bytes()
    with safe_open(f"{path}.index", "np") as file:
        places, keys, ends = (file.get_tensor(name) for name in ("places", "keys", "ends"))
        facts = json.loads(file.metadata()["qlip-tar-index"])
    assert (facts["tar_size"], facts["samples"], facts["version"]) == (len(content), 5, 1)
    for number, ((offset, size), text, (begin, length)) in enumerate(places.tolist()):
        assert content[offset : offset + size] == encoded(number) and text == [-1, -1]
        assert json.loads(content[begin : begin + length])
    assert bytes(keys) == b"00000001000200030004" and ends.tolist() == [4, 8, 12, 16, 20]


def test_an_empty_shard_has_an_index_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", [])
    shard(tmp_path / "x-1.tar", range(3))
    for _ in range(2):
        assert len(TarImages(f"{tmp_path}/x-*.tar")) == 3
        index_all(tmp_path / "x-0.tar", tmp_path / "x-1.tar")


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
def test_the_index_of_another_tar_is_refused_and_made_again_on_demand(tmp_path: Path, change: object) -> None:
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


def test_a_shard_that_changes_in_the_middle_ends_the_run_and_is_no_broken_sample(tmp_path: Path) -> None:
    """Same size, same first and last sample: only the read of what moved can tell, and does."""
    path = shard(tmp_path / "x.tar", range(6))
    index_all(path)
    shard(path, [0, 2, 1, 4, 3, 5])
    config = validate(DataConfig, {"sources": [{"path": str(path)}]}, "r")
    stream = open_stream(config, 0, (8, 8), (0.5,) * 3, (0.5,) * 3, tokenize)
    with pytest.raises(QLIPError, match="its index belongs to another tar"):
        next(batches(stream, 6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no index, or a broken one"),
        (b"text, no index at all" * 100, "no index, or a broken one"),
        (None, "no index, or a broken one"),
        (b'version\\": 2', "of format 2, not 1; make it again with `qlip data index`"),
    ],
)
def test_what_is_no_index_is_said_in_a_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = shard(tmp_path / "x.tar", range(4))
    index_all(path)
    index = Path(f"{path}.index")
    whole = index.read_bytes()
    if content is None:
        index.write_bytes(whole[:-10])
    elif content.startswith(b"version"):
        assert b'version\\": 1' in whole
        index.write_bytes(whole.replace(b'version\\": 1', content))
    else:
        index.write_bytes(content)
    with pytest.raises(QLIPError) as caught:
        TarImages(path)
    assert message in str(caught.value) and "x.tar.index" in str(caught.value) and "\n" not in str(caught.value)
    assert build_index(str(path), Storage()).made and index.read_bytes() == whole


def test_spans_cover_their_samples(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(10))
    index = scan(str(path), Storage())
    for first, last in ((0, 10), (3, 5), (9, 12)):
        begin, end = index.span(first, last)
        parts = [part for n in range(first, min(last, 10)) for part in (index.entry(n).image, index.entry(n).record)]
        assert begin == min(part.offset for part in parts if part) - 512
        assert end == max(part.offset + part.size for part in parts if part)


def test_indexes_of_many_shards_stay_small_in_a_pickle(tmp_path: Path) -> None:
    index = ShardIndex.from_groups(0, [], "x")
    assert len(index) == 0 and index.to_bytes()
    source = tars(tmp_path, 40)
    index_all(*source.shards)
    assert len(pickle.dumps(TarImages(source.shards))) < len(pickle.dumps(source)) / 2


# over the network


def test_a_remote_shard_is_read_through_once_to_index_it_and_then_at_random(
    server: ObjectServer, tmp_path: Path
) -> None:
    local = tars(server.folder, 40)
    address = f"{server.address}/tars-{{00..01}}.tar"
    with pytest.raises(QLIPError, match="no index beside it; make one with `qlip data index`, or set streaming: true"):
        TarImages(address, retry=QUICK)
    with pytest.raises(QLIPError, match="nothing can be written there; name a folder"):
        index_all(f"{server.address}/tars-00.tar")
    into = str(tmp_path / "indexes")
    server.requests.clear()
    index_all(f"{server.address}/tars-00.tar", f"{server.address}/tars-01.tar", into=into)
    tars_asked = [request for request in server.gets() if request.path.endswith(".tar")]
    assert len(tars_asked) == 2  # each smaller than a chunk
    remote = TarImages(address, index=into, retry=QUICK)
    assert everything(remote) == everything(local)
    server.requests.clear()
    assert remote.read(17) == local.read(17) and len(server.gets()) == 1
    assert everything(pickle.loads(pickle.dumps(remote))) == everything(local)


def test_an_index_beside_a_remote_shard_is_found_and_kept_in_the_cache(server: ObjectServer) -> None:
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


def test_the_index_of_another_remote_tar_is_refused(server: ObjectServer, tmp_path: Path) -> None:
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


def test_an_index_folder_must_hold_them(server: ObjectServer, tmp_path: Path) -> None:
    tars(server.folder, 4)
    with pytest.raises(QLIPError, match=r"no index of .*tars-00.tar there; make it with `qlip data index .* -o "):
        TarImages(f"{server.address}/tars-00.tar", index=str(tmp_path / "nowhere"), retry=QUICK)
    with pytest.raises(QLIPError, match="have the same name; use an index folder per folder of shards"):
        TarImages([f"{server.address}/a/x.tar", f"{server.address}/b/x.tar"], index=str(tmp_path), retry=QUICK)


def test_a_store_in_memory_holds_its_indexes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    local, storage = tars(tmp_path, 12), Storage()
    for path in local.shards:
        storage.write(f"memory://tars/{Path(path).name}", Path(path).read_bytes())
        assert build_index(f"memory://tars/{Path(path).name}", storage).index.startswith("memory://tars/")
    for pattern in ("memory://tars/tars-{00..01}.tar", "memory://tars/*.tar"):
        source = SourceConfig(path=pattern).open()
        assert isinstance(source, TarImages) and everything(source) == everything(local)


@pytest.mark.parametrize("fault", ["404", "403", "503"])
def test_a_remote_shard_that_cannot_be_had(server: ObjectServer, tmp_path: Path, fault: str) -> None:
    index_all(*tars(server.folder, 4).shards)
    server.fault = lambda request: fault
    messages = {"404": "no index beside it", "403": "no permission", "503": "gave up after 2 tries"}
    with pytest.raises(QLIPError, match=messages[fault]):
        TarImages(f"{server.address}/tars-00.tar", retry=RetryPolicy(tries=2, longest_wait=0.01))


def test_a_folder_is_not_indexed(tmp_path: Path) -> None:
    folder(tmp_path / "f")
    with pytest.raises(QLIPError, match="'index' goes with the path of tars that are not streamed; remove it"):
        validate(SourceConfig, {"path": str(tmp_path / "f"), "index": "x"}, "r")
    assert np.sum(SourceConfig(path=str(tmp_path / "f")).open().chunk_sizes()) == 7
