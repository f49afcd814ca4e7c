"""Folders and tar shards: what is a sample, what its words are, and what is said of those that are wrong."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qlip.data import FolderImages, RawSample, TarImages
from qlip.data.shards.shard_patterns import expand
from qlip.data.shards.tar_index import Member, split_key, walk
from qlip.data.storage.chunked_reader import open_reader
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

from .samples import encoded, folder, shard, tars, write_tar


def all_of(source: FolderImages | TarImages) -> dict[str, tuple[tuple[str, ...], str | None]]:
    return {raw.key: (raw.captions, raw.label) for raw in (source.read(index) for index in range(len(source)))}


# folders


def test_a_folder_takes_words_from_text_and_json_beside_the_picture(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.png", "a.JPG", "b/c/d.webp", "b/no words.jpeg", ".hidden/x.png"):
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "z.txt").write_text("\ufeffA line\n and another  \n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "one", "captions": ["two", "one"], "label": "cat"}))
    (tmp_path / "a.txt").write_text("json comes first")
    (tmp_path / "b/c/d.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("no picture")
    assert all_of(FolderImages(tmp_path)) == {
        "a.JPG": (("one", "two"), "cat"),
        "b/c/d.webp": ((), None),
        "b/no words.jpeg": ((), None),
        "z.png": (("A line and another",), None),
    }
    assert FolderImages(tmp_path).read(3) == RawSample(encoded(1), ("A line and another",), None, "z.png")
    assert [raw.key for raw in map(FolderImages(tmp_path).read, range(4))] == sorted(all_of(FolderImages(tmp_path)))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_table_says_which_pictures_there_are_and_rows_of_one_add_up(tmp_path: Path, form: str) -> None:
    for name in ("b.png", "a.png", "unlisted.png"):
        (tmp_path / name).write_bytes(encoded(2))
    rows = [
        {"image": "b.png", "caption": 'a "quoted", word'},
        {"image": "./a.png", "caption": "first", "label": "x"},
        {"image": "a.png", "caption": "second"},
    ]
    if form == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    else:
        text = 'image,caption,label\nb.png,"a ""quoted"", word",\n./a.png,first,x\na.png,second,\n'
    (tmp_path / f"captions.{form}").write_text(text)
    assert all_of(FolderImages(tmp_path)) == {
        "a.png": (("first", "second"), "x"),
        "b.png": (('a "quoted", word',), None),
    }


def test_another_caption_field(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
        (tmp_path / f"{number}.json").write_text(json.dumps({"caption": "no", "alt": [f"yes {number}", "too"]}))
    assert all_of(FolderImages(tmp_path, caption_field="alt"))["1.png"] == (("yes 1", "too"), None)
    (tmp_path / "1.json").write_text("{}")
    source = FolderImages(tmp_path, caption_field="alt")
    with pytest.raises(QLIPError, match="1.json: no field 'alt'; it has no fields"):
        source.read(1)
    (tmp_path / "1.json").unlink()
    with pytest.raises(QLIPError, match="1.json: not there, and caption field 'alt' was asked for"):
        source.read(1)


def empty(path: Path) -> None:
    path.mkdir()


def test_a_caption_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    path, words = tmp_path / "set", "one\u2028two\x85three"
    path.mkdir()
    Image.new("RGB", (8, 8)).save(path / "a.png")
    line = json.dumps({"image": "a.png", "caption": words}, ensure_ascii=False)
    (path / "captions.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert FolderImages(path).read(0).captions == ("one two three",)


def two_tables(path: Path) -> None:
    path.mkdir()
    (path / "captions.csv").write_text("image,caption\n")
    (path / "captions.jsonl").write_text("")


def table(text: str, name: str = "captions.jsonl") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (lambda path: None, None, "no such folder"),
        (empty, None, "no image in it"),
        (two_tables, None, "holds both captions.jsonl and captions.csv; keep one"),
        (table('{"image": "a.png"'), None, "captions.jsonl line 1: not valid json"),
        (table("\n[1]"), None, "captions.jsonl line 2: a json list; each line is an object"),
        (table('{"caption": "a"}'), None, "line 1: names no image; a field 'image' should hold its path"),
        (table('{"image": "../a.png"}'), None, "leads out of the folder"),
        (
            table('{"image": "a.png", "caption": 3}'),
            None,
            "field 'caption' holds a int; captions are strings",
        ),
        (table('{"image": "a.png", "label": 3}'), None, "field 'label' holds a int; a label is a name"),
        (table('{"image": "a.png", "text": "x"}'), "words", "no field 'words'; it has 'image', 'text'"),
        (table("file,caption\n,x\n", "captions.csv"), None, "captions.csv row 2: names no image"),
        (lambda path: folder(path) and None, "alt", "caption field 'alt' was asked for"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why_in_a_line(
    tmp_path: Path, make: Callable[[Path], None], field: str | None, message: str
) -> None:
    make(tmp_path / "set")
    with pytest.raises(QLIPError) as caught:
        FolderImages(tmp_path / "set", caption_field=field)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# tars


def test_names_in_a_tar_split_at_the_first_dot_of_their_last_part() -> None:
    assert split_key("a.b/c.seg.PNG") == ("a.b/c", "seg.png")
    assert split_key("./x.jpg") == ("x", "jpg")
    assert split_key("plain") == ("plain", "")


def test_files_of_one_key_are_one_sample(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s.tar",
        [
            ("a.txt", b"a text"),
            ("dir.1/b.seg.png", b"a mask, not the picture"),
            ("a.jpg", encoded(1, "jpeg")),
            ("dir.1/b.png", encoded(2)),
            ("dir.1/b.webp", encoded(3, "webp")),
            ("dir.1/b.json", b'{"caption": "from json", "label": "l"}'),
            ("dir.1/b.txt", b"json comes first"),
            ("words-only.txt", b"no picture"),
            ("c.JPEG", encoded(4, "jpeg")),
            ("__index__", b""),
        ],
    )
    source = TarImages(tmp_path / "s.tar")
    assert all_of(source) == {"a": (("a text",), None), "dir.1/b": (("from json",), "l"), "c": ((), None)}
    assert source.read(1).image == encoded(2)
    assert source.name == "s.tar"


def test_braces_and_globs_mean_shards_in_order(tmp_path: Path) -> None:
    assert expand("x-{000..002}.tar") == ["x-000.tar", "x-001.tar", "x-002.tar"]
    assert expand("{9..11}") == ["9", "10", "11"]
    assert expand("{b,a}/{0..1}.tar") == ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]
    source = tars(tmp_path, 10)
    assert len(source) == 10 and [source.read(i).key for i in (0, 5, 9)] == ["0000", "0005", "0009"]
    again = TarImages(f"{tmp_path}/*.tar")
    assert [again.read(i) for i in range(10)] == [source.read(i) for i in range(10)]
    assert len(TarImages([tmp_path / "tars-01.tar", tmp_path / "tars-00.tar"])) == 10
    with pytest.raises(QLIPError, match="runs backwards; write {1..3}"):
        expand("{3..1}.tar")
    with pytest.raises(QLIPError, match="matches nothing"):
        expand(f"{tmp_path}/none-*.tar")
    with pytest.raises(QLIPError, match="more than 1000000 files"):
        expand("{0..9999}{0..9999}")


def members(path: Path) -> list[Member]:
    with open_reader(str(path), Storage()) as (fetch, length):
        return list(walk(fetch, length, str(path)))


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    """What the standard library finds."""
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile() and not m.issparse()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read_as_the_standard_library_reads_it(tmp_path: Path, form: int) -> None:
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


def test_a_tar_of_extended_headers_is_read_as_the_standard_library_reads_it(tmp_path: Path) -> None:
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


def test_folders_and_links_in_a_tar_are_not_files(tmp_path: Path) -> None:
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


def test_a_truncated_tar_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = shard(tmp_path / "x.tar", range(6)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for size in [700, 1024, *range(1500, end - 200, 700)]:
        path.write_bytes(whole[:size])
        with pytest.raises(QLIPError, match="cut.tar: truncated"):
            TarImages(path)


def test_a_broken_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(6))
    data = bytearray(path.read_bytes())
    data[members(path)[4].offset - 500] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(QLIPError, match="truncated"):
        TarImages(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "not an uncompressed tar file"),
        (b"text, not a tar" * 100, "not an uncompressed tar file"),
        (bytes(10240), "no image in it"),
    ],
)
def test_what_is_no_tar_is_named_in_a_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(QLIPError) as caught:
        TarImages(tmp_path / "x.tar")
    assert message in str(caught.value) and "x.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_may_occur_once_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", encoded(0)), ("a.png", encoded(1))])
    with pytest.raises(QLIPError, match=r"holds a\.png twice"):
        TarImages(path)


def test_a_caption_field_that_the_first_sample_has_not_is_an_error_at_once(tmp_path: Path) -> None:
    files = [("a.png", encoded(0)), ("a.json", b'{"alt": "x", "url": "y"}')]
    path = write_tar(tmp_path / "x.tar", files)
    assert TarImages(path, "alt").read(0).captions == ("x",)
    with pytest.raises(QLIPError, match="a.json: no field 'txt'; it has 'alt', 'url'"):
        TarImages(path, "txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (b"{", "not valid json"),
        (b"[]", "a json list"),
        (b'{"captions": [1]}', "holds a int"),
        (b"\xff", "not valid"),
    ],
)
def test_broken_words_are_the_samples_own_error(tmp_path: Path, words: bytes, message: str) -> None:
    source = TarImages(write_tar(tmp_path / "x.tar", [("a.png", encoded(0)), ("a.json", words)]))
    with pytest.raises(QLIPError, match=message):
        source.read(0)


def test_a_shard_that_shrank_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    source = TarImages(shard(tmp_path / "x.tar", range(4)))
    path = tmp_path / "x.tar"
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(QLIPError, match="it changed after it was opened"):
        source.read(3)


def test_sources_pickle_into_workers_and_stay_small(tmp_path: Path) -> None:
    for source in (tars(tmp_path, 10), folder(tmp_path / "f")):
        again = pickle.loads(pickle.dumps(source))
        assert [again.read(i) for i in range(len(source))] == [source.read(i) for i in range(len(source))]
        assert Image.open(io.BytesIO(again.read(0).image)).size == (24, 16)
