"""The walk over a tar's headers, in every dialect, against Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from qlip.data import TarImages
from qlip.data.shards.tar_index import Member, split_key, walk
from qlip.data.storage.chunked_reader import open_reader
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

from ..samples import all_of, encoded, shard, write_tar


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
    names = ["a.png", "d" * 60 + "/" + "e" * 60 + "/f.png", "sub/g.txt", "h.json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 200 + ".png", "über.png"]
    path = write_tar(tmp_path / "x.tar", [(name, name.encode() * 50) for name in names], form)
    found = members(path)
    assert [(name, offset, size) for name, _, offset, size, _ in found] == by_tarfile(path)
    assert [member.name for member in found] == names
    content = path.read_bytes()
    assert all(content[m.offset : m.offset + m.size] == m.name.encode() * 50 for m in found)
    with open_reader(str(path), Storage()) as (fetch, length):
        for number, member in enumerate(found):  # a walk may begin at any file's first header
            assert list(walk(fetch, length, "x", member.start)) == found[number:]


def test_walk__extended_headers_as_the_standard_library(tmp_path: Path) -> None:
    """As webdataset's writer makes it (times with fractions), with global headers, long links, devices and folders."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for number, kind in enumerate("0 5 0 1 2 3 6 0 7".split()):
            member = tarfile.TarInfo(("long/" * 30 if number % 2 else "") + f"file {number}.png")
            member.type, member.mtime, member.linkname = kind.encode(), 1.5 + number, "t" * 150
            member.size = 700 * number if kind in "07" else 0
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    assert [(name, offset, size) for name, _, offset, size, _ in members(path)] == by_tarfile(path)
    assert len(members(path)) == 4


def test_walk__folders_and_links_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
        member = tarfile.TarInfo("a.png")
        member.size = len(encoded(0))
        tar.addfile(member, io.BytesIO(encoded(0)))
    assert list(all_of(TarImages(path))) == ["a"]


def test_walk__refuses_a_tar_truncated_anywhere(tmp_path: Path) -> None:
    whole = shard(tmp_path / "x.tar", range(6)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for size in [700, 1024, *range(1500, end - 200, 700)]:
        path.write_bytes(whole[:size])
        with pytest.raises(QLIPError, match="cut.tar: truncated"):
            TarImages(path)


def test_walk__a_broken_header_is_not_the_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(6))
    data = bytearray(path.read_bytes())
    data[members(path)[4].offset - 500] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(QLIPError, match="truncated"):
        TarImages(path)
