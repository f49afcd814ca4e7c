"""Index files: equal to a walk, safetensors, spans."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from safetensors import safe_open

from qlip.data import TarImages
from qlip.data.shards.build_index import build_index
from qlip.data.shards.shard_index import scan
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

from ..samples import encoded, everything, index_all, shard, write_tar

MIXED = [
    ("a.json", b'{"caption": "apart"}'),
    ("b.png", encoded(1)),
    ("b.txt", b"beside"),
    ("a.png", encoded(2)),
    ("words.txt", b"no image"),
    ("\u00fc/c.webp", encoded(3, "webp")),
    ("empty.txt", b""),
]


def test_shard_index__equals_a_walk(tmp_path: Path) -> None:
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


def test_shard_index__is_a_safetensors_file(tmp_path: Path) -> None:
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


def test_shard_index__of_an_empty_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", [])
    shard(tmp_path / "x-1.tar", range(3))
    for _ in range(2):
        assert len(TarImages(f"{tmp_path}/x-*.tar")) == 3
        index_all(tmp_path / "x-0.tar", tmp_path / "x-1.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no index, or a broken one"),
        (b"text, no index at all" * 100, "no index, or a broken one"),
        (None, "no index, or a broken one"),
        (b'version\\": 7', "of format 7, not 2; make it again with `qlip data index`"),
    ],
)
def test_shard_index__other_files_are_refused_in_a_line(tmp_path: Path, content: bytes | None, message: str) -> None:
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


def test_shard_index__spans_cover_their_samples(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(10))
    index = scan(str(path), Storage())
    for first, last in ((0, 10), (3, 5), (9, 12)):
        begin, end = index.span(first, last)
        parts = [part for n in range(first, min(last, 10)) for part in (index.entry(n).image, index.entry(n).record)]
        assert begin == min(part.offset for part in parts if part) - 512
        assert end == max(part.offset + part.size for part in parts if part)
