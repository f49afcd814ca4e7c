"""Tar shards as a source: samples, errors, shards that change."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.data import TarImages
from qlip.data.shards.build_index import build_index
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

from ..samples import all_of, encoded, shard, write_tar


def test_tar_images__files_of_one_key_are_one_sample(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s.tar",
        [
            ("a.txt", b"a text"),
            ("dir.1/b.seg.png", b"a mask, not the image"),
            ("a.jpg", encoded(1, "jpeg")),
            ("dir.1/b.png", encoded(2)),
            ("dir.1/b.webp", encoded(3, "webp")),
            ("dir.1/b.json", b'{"caption": "from json", "label": "l"}'),
            ("dir.1/b.txt", b"json comes first"),
            ("words-only.txt", b"no image"),
            ("c.JPEG", encoded(4, "jpeg")),
            ("__index__", b""),
        ],
    )
    source = TarImages(tmp_path / "s.tar")
    assert all_of(source) == {"a": (("a text",), None), "dir.1/b": (("from json",), "l"), "c": ((), None)}
    assert source.read(1).image == encoded(2)
    assert source.name == "s.tar"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "not an uncompressed tar file"),
        (b"text, not a tar" * 100, "not an uncompressed tar file"),
        (bytes(10240), "no image in it"),
    ],
)
def test_tar_images__names_a_file_that_is_no_tar(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(QLIPError) as caught:
        TarImages(tmp_path / "x.tar")
    assert message in str(caught.value) and "x.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_tar_images__refuses_a_name_twice(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", encoded(0)), ("a.png", encoded(1))])
    with pytest.raises(QLIPError, match=r"holds a\.png twice"):
        TarImages(path)


def test_tar_images__a_missing_caption_field_is_an_error_at_once(tmp_path: Path) -> None:
    files = [("a.png", encoded(0)), ("a.json", b'{"alt": "x", "url": "y"}')]
    path = write_tar(tmp_path / "x.tar", files)
    assert TarImages(path, "alt").read(0).captions == ("x",)
    with pytest.raises(QLIPError, match="a.json: no field 'txt'; it has 'alt', 'url'"):
        TarImages(path, "txt")


def test_tar_images__notices_a_shard_that_shrank(tmp_path: Path) -> None:
    source = TarImages(shard(tmp_path / "x.tar", range(4)))
    path = tmp_path / "x.tar"
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(QLIPError, match="it changed after it was opened"):
        source.read(3)


def test_tar_images__a_class_file_is_the_label_with_and_without_an_index_file(tmp_path: Path) -> None:
    files = [("a.jpg", b"x"), ("a.cls", b"281\n"), ("b.jpg", b"y"), ("b.json", b'{"label": "dog"}'), ("b.cls", b"3")]
    write_tar(tmp_path / "s.tar", [*files, ("c.jpg", b"z"), ("c.txt", b"text")])
    expected = [("a", (), "281"), ("b", (), "dog"), ("c", ("text",), None)]
    for _ in range(2):
        source = TarImages(tmp_path / "s.tar")
        found = [source.read(index) for index in range(3)]
        assert [(raw.key, raw.captions, raw.label) for raw in found] == expected
        assert [source.label(index) for index in range(3)] == ["281", "dog", None]
        build_index(str(tmp_path / "s.tar"), Storage())
