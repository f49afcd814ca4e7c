"""Files that are written whole, locks, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlip.errors import QLIPError, QLIPWarning
from qlip.files import (
    files_under,
    folder_written_aside,
    is_number,
    json_values,
    lines_of,
    locked,
    refuse_special,
    sha256_of,
    suffixes_of,
    write_bytes,
    write_text,
)


@pytest.mark.parametrize("exists", [False, True])
def test_folder_written_aside__appears_whole_or_not_at_all(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "folder"
    if exists:
        folder.mkdir(parents=True)
        (folder / "within").mkdir()
        for name in ("a", "within/a"):
            (folder / name).write_text("old")
        for name in ("other", "within/other"):
            (folder / name).write_text("stays")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(QLIPError, match="folder: cannot write"), folder_written_aside(folder) as aside:
        (aside / "a").write_text("half")
        raise OSError("no space left")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with folder_written_aside(folder) as aside:
        (aside / "a").write_text("new")
        (aside / "b").write_text("more")
        (aside / "within").mkdir()
        (aside / "within" / "a").write_text("new")
        assert {path: path.read_bytes() for path in before} == before
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    old = {"other": "stays", "within/other": "stays"} if exists else {}
    assert found == {"a": "new", "b": "more", "within/a": "new"} | old
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["folder", "folder/deeper/.lock"])
def test_locked__one_holder_at_a_time(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with locked(path, "taken"):
        with pytest.raises(QLIPError, match=r"^busy; wait$"), locked(path, "busy; wait"):
            raise AssertionError("both hold it")
        with pytest.raises(QLIPError, match="busy"), locked(path, "busy"):  # a refusal lets nothing go
            raise AssertionError("both hold it")
    with locked(path, "taken"):
        pass
    assert [one.name for one in path.iterdir()] == [] if path.is_dir() else path.read_bytes() == b""


def test_locked__errors_inside_pass(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="of the block"), locked(tmp_path, "taken"):
        raise BlockingIOError("of the block")
    with locked(tmp_path, "taken"):
        pass


def test_locked__released_when_the_process_is_killed(tmp_path: Path) -> None:
    program = "import pathlib, sys\nfrom qlip.files import locked\nwith locked(pathlib.Path(sys.argv[1]), ''):\n"
    program += "    print(1, flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        with pytest.raises(QLIPError, match="another"), locked(tmp_path, "another"):
            raise AssertionError("both hold it")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(tmp_path, "another"):
            pass


def test_locked__unlockable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lock = locked(tmp_path / "file" / "run" / ".lock", "taken")
    with pytest.raises(QLIPError, match=r"file/run/\.lock: cannot write \(Not a directory\)"), lock:
        raise AssertionError("it is held")


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_sha256_of__covers_the_whole_file(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["y" * 255, "\u00e9" * 127])
def test_write_bytes__names_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    write_bytes(tmp_path / name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_lines_of__ends_at_newlines_alone_and_drops_the_mark() -> None:
    data = "\ufeffcat\r\na\u2028b\x0cc\r\n\n²\n".encode()
    assert lines_of(data, "x") == ["cat", "a\u2028b\x0cc", "", "²"]
    assert not is_number("²") and not is_number("٣") and not is_number("") and is_number("07")
    with pytest.raises(QLIPError, match=r"^labels\.txt: not UTF-8 text; save it as UTF-8$"):
        lines_of(b"caf\xe9", "labels.txt")


def test_files_under__follows_links_and_ends_where_they_lead_back(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for name in ("a.jpg", "sub/b.jpg", ".hidden/c.jpg", ".d.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    other.mkdir()
    (other / "e.jpg").write_bytes(b"")
    (other / "up").symlink_to("..")
    (folder / "link").symlink_to(other)
    (folder / "again.jpg").symlink_to("a.jpg")
    (folder / "nowhere.jpg").symlink_to("missing")
    os.mkfifo(folder / "pipe.jpg")
    with pytest.warns(QLIPWarning, match="folder: 2 pipes, sockets or devices left out, such as pipe.jpg"):
        found = sorted(files_under(folder))
    assert found == sorted(set(found))
    assert {name for name in found if "up/" not in name} == {
        "a.jpg", "again.jpg", "link/e.jpg", "nowhere.jpg", "sub/b.jpg"
    }  # fmt: skip
    assert len(found) < 20
    assert suffixes_of(["a.TXT", "b.txt", "c"]) == "2 .txt, 1 without suffix"


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_refuse_special__pipes_devices_and_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("x.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.png")
    else:
        path = Path("/dev/zero")
    with pytest.raises(QLIPError, match=f"{path}: not a regular file but a pipe, socket or device"):
        refuse_special(path)


def test_refuse_special__files_folders_and_what_is_absent_pass(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, Path(__file__), tmp_path / "link", tmp_path / "absent"):
        refuse_special(path)


def test_write_text__names_that_are_not_utf_8_are_read_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"fot\xe9s \xc3\xa9")
    write_text(tmp_path / "a.json", json.dumps({"name": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": name}
    assert "\u00e9" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_values__are_finite() -> None:
    assert json_values({"a": (float("inf"), [float("nan")]), "b": 1}) == {"a": ["Infinity", ["NaN"]], "b": 1}
