"""Building index files, of local and remote shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from qlip.data import TarImages
from qlip.data.config import SourceConfig
from qlip.data.shards.build_index import build_index
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, validate

from ..objects import QUICK, ObjectServer
from ..samples import everything, folder, index_all, tars


def test_build_index__reads_a_remote_shard_once(server: ObjectServer, tmp_path: Path) -> None:
    local = tars(server.folder, 40)
    address = f"{server.address}/tars-{{00..01}}.tar"
    with pytest.raises(QLIPError, match="no index beside it; make one with `qlip data index`, or set streaming: true"):
        TarImages(address, retry=QUICK)
    with pytest.raises(QLIPError, match="this storage is read-only; name a folder"):
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


def test_build_index__in_remote_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    local, storage = tars(tmp_path, 12), Storage()
    for path in local.shards:
        storage.write(f"memory://tars/{Path(path).name}", Path(path).read_bytes())
        assert build_index(f"memory://tars/{Path(path).name}", storage).index.startswith("memory://tars/")
    for pattern in ("memory://tars/tars-{00..01}.tar", "memory://tars/*.tar"):
        source = SourceConfig(path=pattern).open()
        assert isinstance(source, TarImages) and everything(source) == everything(local)


def test_source_config__a_folder_needs_no_index(tmp_path: Path) -> None:
    folder(tmp_path / "f")
    with pytest.raises(QLIPError, match="'index' goes with the path of tars that are not streamed; remove it"):
        validate(SourceConfig, {"path": str(tmp_path / "f"), "index": "x"}, "r")
    assert np.sum(SourceConfig(path=str(tmp_path / "f")).open().chunk_sizes()) == 7
