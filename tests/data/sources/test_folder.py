"""Folders: samples, annotations, tables, and errors."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qlip.data import FolderImages, RawSample, TarImages
from qlip.errors import QLIPError, QLIPWarning

from ..samples import all_of, encoded, folder, tars, write_tar


def test_folder_images__annotations_from_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.png", "a.JPG", "b/c/d.webp", "b/no words.jpeg", ".hidden/x.png"):
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "z.txt").write_text("\ufeffA line\n and another  \n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "one", "captions": ["two", "one"], "label": "cat"}))
    (tmp_path / "a.txt").write_text("json comes first")
    (tmp_path / "b/c/d.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("no image")
    assert all_of(FolderImages(tmp_path)) == {
        "a.JPG": (("one", "two"), "cat"),
        "b/c/d.webp": ((), None),
        "b/no words.jpeg": ((), None),
        "z.png": (("A line and another",), None),
    }
    assert FolderImages(tmp_path).read(3) == RawSample(encoded(1), ("A line and another",), None, "z.png")
    assert [raw.key for raw in map(FolderImages(tmp_path).read, range(4))] == sorted(all_of(FolderImages(tmp_path)))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_folder_images__a_table_lists_the_images_and_its_rows_add_up(tmp_path: Path, form: str) -> None:
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


def test_folder_images__another_caption_field(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
        (tmp_path / f"{number}.json").write_text(json.dumps({"caption": "no", "alt": [f"yes {number}", "too"]}))
    assert all_of(FolderImages(tmp_path, caption_field="alt"))["1.png"] == (("yes 1", "too"), None)
    (tmp_path / "1.json").write_text("{}")
    source = FolderImages(tmp_path, caption_field="alt")
    assert "1.json: no field 'alt'; it has no fields" in str(source.read(1).text_fault)
    (tmp_path / "1.json").unlink()
    assert "1.json: not there, and caption field 'alt' was asked for" in str(source.read(1).text_fault)


def empty(path: Path) -> None:
    path.mkdir()


def test_folder_images__captions_may_hold_line_separators(tmp_path: Path) -> None:
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
        (table('{"image": "a.png", "text": "x"}'), "words", "no field 'words'; it has 'image', 'text'"),
        (table("file,caption\n,x\n", "captions.csv"), None, "captions.csv row 2: names no image"),
        (lambda path: folder(path) and None, "alt", "caption field 'alt' was asked for"),
    ],
)
def test_folder_images__errors_are_one_line(
    tmp_path: Path, make: Callable[[Path], None], field: str | None, message: str
) -> None:
    make(tmp_path / "set")
    with pytest.raises(QLIPError) as caught:
        FolderImages(tmp_path / "set", caption_field=field)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folder_images__file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / name).with_suffix(".txt").write_text("a cafe")
    source = FolderImages(tmp_path)
    assert source.key(0) == "caf\\udce9.png" and source.read(0) == RawSample(
        encoded(1), ("a cafe",), None, source.key(0)
    )
    tar = TarImages(write_tar(tmp_path / "x.tar", [(name, encoded(2)), (name[:-3] + "txt", b"another")]))
    assert tar.read(0) == RawSample(encoded(2), ("another",), None, "caf\\udce9") and tar.key(0) == tar.read(0).key


def test_folder_images__one_odd_file_is_no_missing_caption_field(tmp_path: Path) -> None:
    for number, record in enumerate(("{", '{"alt": "yes"}')):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
        (tmp_path / f"{number}.json").write_text(record)
    assert all_of(FolderImages(tmp_path, caption_field="alt")) == {"0.png": ((), None), "1.png": (("yes",), None)}
    with pytest.raises(QLIPError, match=r"0\.json: not valid json"):
        FolderImages(tmp_path, caption_field="other")


def test_sources__pickle_small(tmp_path: Path) -> None:
    for source in (tars(tmp_path, 10), folder(tmp_path / "f")):
        again = pickle.loads(pickle.dumps(source))
        assert [again.read(i) for i in range(len(source))] == [source.read(i) for i in range(len(source))]
        assert Image.open(io.BytesIO(again.read(0).image)).size == (24, 16)


def test_folder_images__linked_folders_are_read(tmp_path: Path) -> None:
    for name in ("all/own.png", "cats/1.bmp", "cats/2.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "all" / "cats").symlink_to("../cats")
    (tmp_path / "cats" / "up").symlink_to("../all")
    assert list(all_of(FolderImages(tmp_path / "all"))) == ["cats/1.bmp", "cats/2.gif", "own.png"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_folder_images__metadata_as_imagefolder_has_it(tmp_path: Path, form: str) -> None:
    """`file_name` is relative to the table's own folder; other folders keep their text files."""
    for name in ("train/a.png", "train/deep/b.png", "train/unlisted.png", "test/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(2))
    (tmp_path / "test/c.txt").write_text("beside")
    rows = [("a.png", "one"), ("deep/b.png", "two")]
    text = "file_name,text\n" + "".join(f"{path},{caption}\n" for path, caption in rows)
    if form == "jsonl":
        text = "".join(json.dumps({"path": "elsewhere.png", "file_name": p, "text": c}) + "\n" for p, c in rows)
    (tmp_path / "train" / f"metadata.{form}").write_text(text)
    with pytest.warns(QLIPWarning, match="1 image left out that no table lists, such as train/unlisted.png"):
        found = all_of(FolderImages(tmp_path))
    expected = {"test/c.png": "beside", "train/a.png": "one", "train/deep/b.png": "two"}
    assert found == {key: ((caption,), None) for key, caption in expected.items()}


def test_folder_images__metadata_that_names_no_image_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "metadata.jsonl").write_text('{"camera": "x"}\n')
    assert all_of(FolderImages(tmp_path)) == {"a.png": ((), None)}


@pytest.mark.parametrize("field", ["text", "TEXT", "Caption", "txt", "prompt"])
@pytest.mark.parametrize("path", ["image", "FILE_NAME", "filepath"])
@pytest.mark.parametrize(("mark", "cut"), [("", ","), ("\ufeff", ";"), ("", "\t")])
def test_folder_images__usual_columns_and_separators(
    tmp_path: Path, field: str, path: str, mark: str, cut: str
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    rows = [[path, field, "Class"], ["a.png", '"one, two; three"', "cat"]]
    (tmp_path / "captions.csv").write_text(mark + "\n".join(cut.join(row) for row in rows), encoding="utf-8")
    assert all_of(FolderImages(tmp_path)) == {"a.png": (("one, two; three",), "cat")}


def test_folder_images__files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "b.heic", "c.heic", "c.cls"):
        (tmp_path / name).write_bytes(encoded(1))
    with pytest.warns(QLIPWarning, match="2 .heic, 1 .cls left out, names of images end in jpg jpeg png") as caught:
        FolderImages(tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("content", [b"caf\xe9,x\n", b'camera\n"unclosed', b'"unclosed\n'])
def test_folder_images__an_unrelated_broken_table_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metadata.csv").write_bytes(content)
    with pytest.warns(QLIPWarning, match="1 table left out that cannot be read, such as .*notes/metadata.csv: not "):
        assert all_of(FolderImages(tmp_path)) == {"a.png": ((), None)}
    (tmp_path / "notes" / "metadata.csv").write_bytes(b"file_name,text\n../b.png,caf\xe9\n")
    with pytest.raises(QLIPError, match="notes/metadata.csv: not UTF-8 text"):
        FolderImages(tmp_path)
