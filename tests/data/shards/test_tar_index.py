"""The walk over a tar's headers, in every dialect, against Python's tarfile."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from qlip.data.shards.shard_index import scan
from qlip.data.shards.tar_index import Member, groups, split_key, walk
from qlip.data.storage.chunked_reader import open_reader
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPWarning

from ..samples import write_tar


def test_split_key__at_the_first_dot_of_the_last_component() -> None:
    assert split_key("a.b/c.seg.PNG") == ("a.b/c", "seg.png")
    assert split_key("./x.jpg") == ("x", "jpg")
    assert split_key("plain") == ("plain", "")


def members(path: Path) -> list[Member]:
    with open_reader(str(path), Storage()) as (fetch, length):
        return list(walk(fetch, length, str(path)))


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    """What the standard library finds."""
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile() and not m.issparse()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk__every_dialect_as_the_standard_library(tmp_path: Path, form: int) -> None:
    names = "IMG_1.5.jpg|IMG_1.5.txt|IMG_1.6.jpg|v2.0 (final).jpg|c.jpg|c.seg.png|c.1.png|d.seg.png"
    write_tar(tmp_path / "x.tar", [(name, b"x") for name in names.split("|")])
    data = (tmp_path / "x.tar").read_bytes()
    found = list(groups(walk(lambda at, size: data[at : at + size], len(data), "x.tar")))
    assert [(one.key, sorted(one.files)) for one, _ in found if one.image] == [
        ("IMG_1.5", ["jpg", "txt"]), ("IMG_1.6", ["jpg"]), ("v2.0 (final)", ["jpg"]), ("c", ["jpg"])
    ]  # fmt: skip
    assert [one.start for one, _ in found[1:]] == [after for _, after in found[:-1]] and found[-1][1] == -1
    for group, _ in found:  # a walk may begin at any sample
        rest = groups(walk(lambda at, size: data[at : at + size], len(data), "x.tar", group.start))
        assert next(rest)[0].key == group.key


def test_scan__image_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("d.seg.png", b"x"), ("e.depth.png", b"x")])
    with pytest.warns(QLIPWarning, match=r"x\.tar: 2 image files are left out.*: d\.seg\.png, \.\.\.;"):
        assert len(scan(str(tmp_path / "x.tar"), Storage())) == 1
