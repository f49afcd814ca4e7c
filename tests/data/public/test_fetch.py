"""Fetching packages and pages, with archives and clients made by the tests; no network."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlip.data.public import fetch
from qlip.data.public.fetch import ARCHIVES, Package, fetch_package, fetch_page, unpack
from qlip.errors import QLIPError
from qlip.files import sha256_of

from ..archives import tgz


@pytest.fixture(autouse=True)
def no_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ARCHIVES, raising=False)


def npm(archive: Path, name: str = "@scope/some-thing", version: str = "1.2.3") -> Package:
    return Package("npm", name, version, sha256_of(archive), "MIT")


def client(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package client of our own on the path, before the real ones."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + "/usr/bin" + os.pathsep + "/bin")


def test_fetch_package__through_its_own_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tgz(tmp_path / "registry" / "scope-some-thing-1.2.3.tgz", {"package/x": b"1"})
    client(tmp_path / "bin", "npm", f'echo "$@" > asked; cp {archive} .', monkeypatch)
    (tmp_path / "raw").mkdir()
    fetched = fetch_package(npm(archive), tmp_path / "raw")
    assert (tmp_path / "raw" / "asked").read_text().split() == ["pack", "--loglevel=error", "@scope/some-thing@1.2.3"]
    assert fetched.path == tmp_path / "raw" / archive.name
    assert fetched.origin == "npm package @scope/some-thing 1.2.3" and fetched.sha256 == sha256_of(archive)


def test_fetch_package__refuses_another_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tgz(tmp_path / "registry" / "scope-some-thing-1.2.3.tgz", {"package/x": b"1"})
    package = npm(archive)
    tgz(archive, {"package/x": b"2"})
    client(tmp_path / "bin", "npm", f"cp {archive} .", monkeypatch)
    with pytest.raises(QLIPError, match=r"some-thing-1.2.3.tgz: SHA-256 is .*, expected .*; fetch it again"):
        fetch_package(package, tmp_path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; echo 'npm error no network' >&2; echo 'npm error log' >&2; exit 1",
         "failed (npm error code ENOTFOUND; npm error no network); check the network"),
        ("exit 7", "failed (status 7)"),
        ("exit 0", "failed (status 0)"),
    ],
)  # fmt: skip
def test_fetch_package__quotes_a_failing_client_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    client(tmp_path / "bin", "npm", script, monkeypatch)
    with pytest.raises(QLIPError) as caught:
        fetch_package(Package("npm", "thing", "1.0.0", "0", "MIT"), tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert "put thing-1.0.0.tgz into a folder and set QLIP_DATA_ARCHIVES to it" in str(caught.value)


@pytest.mark.parametrize("name", ["npm", "apt-get"])
def test_fetch_package__names_a_missing_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QLIPError, match=f"thing: {name} is not on this machine; install it, or put"):
        fetch_package(Package(name, "thing", "1.0.0", "0", "MIT"), tmp_path)


def test_fetch_package__the_folder_of_archives_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tgz(tmp_path / "archives" / "scope-some-thing-1.2.3.tgz", {"package/x": b"1"})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(ARCHIVES, str(tmp_path / "archives"))
    assert fetch_package(npm(archive), tmp_path).path == archive


def test_fetch_package__takes_another_debian_version_as_apt_verified_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARCHIVES, str(tmp_path))
    (tmp_path / "thing_2%3a4.5-1_all.deb").write_bytes(b"x")
    fetched = fetch_package(Package("apt-get", "thing", "1:1.0-1", "0" * 64, "free"), tmp_path)
    assert fetched.origin == "apt-get package thing 2:4.5-1" and fetched.sha256 == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(QLIPError, match="SHA-256"):
        fetch_package(Package("apt-get", "thing", "2:4.5-1", "0" * 64, "free"), tmp_path)


def test_unpack__refuses_broken_and_hostile_archives(tmp_path: Path) -> None:
    good = tgz(tmp_path / "a.tgz", {"package/x": b"1"})
    assert (unpack(good, tmp_path / "out") / "package" / "x").read_bytes() == b"1"
    (tmp_path / "cut.tgz").write_bytes(good.read_bytes()[:60])
    hostile = tgz(tmp_path / "hostile.tgz", {"../../escaped": b"1"})
    for archive in (tmp_path / "cut.tgz", hostile):
        with pytest.raises(QLIPError, match=f"{archive.name}: cannot be unpacked"):
            unpack(archive, tmp_path / "deep" / "out")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian archive")
def test_unpack__debian_archives(tmp_path: Path) -> None:
    control = tmp_path / "tree" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n")
    (tmp_path / "tree" / "usr").mkdir()
    (tmp_path / "tree" / "usr" / "x").write_text("1")
    archive = tmp_path / "thing_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "tree"), str(archive)], check=True, capture_output=True)
    assert (unpack(archive, tmp_path / "out") / "usr" / "x").read_text() == "1"
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(QLIPError, match="thing_1_all.deb: cannot be unpacked"):
        unpack(archive, tmp_path / "out2")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_page__verifies_the_checksum(tmp_path: Path, site: tuple[Path, str]) -> None:
    folder, address = site
    (folder / "set.bin").write_bytes(b"content" * 1000)
    digest = sha256_of(folder / "set.bin")
    fetched = fetch_page(f"{address}/set.bin", digest, tmp_path)
    assert fetched is not None and fetched.path.read_bytes() == b"content" * 1000
    assert fetch_page(f"{address}/set.bin", "0" * 64, tmp_path) is None
    assert fetch_page(f"{address}/absent.bin", digest, tmp_path) is None
    assert fetch_page("http://127.0.0.1:9/set.bin", digest, tmp_path) is None


def test_fetch_page__the_folder_of_archives_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept" / "set[1].bin"
    kept.parent.mkdir()
    kept.write_bytes(b"content")
    monkeypatch.setenv(ARCHIVES, str(kept.parent))
    fetched = fetch_page("http://127.0.0.1:9/set[1].bin", sha256_of(kept), tmp_path)
    assert fetched is not None and fetched.path == kept and fetched.origin == f"set[1].bin in {ARCHIVES}"
    assert fetch_page("http://127.0.0.1:9/other.bin", sha256_of(kept), tmp_path) is None
    with pytest.raises(QLIPError, match=r"set\[1\]\.bin: SHA-256 is .*, that of http:.* is 00000000"):
        fetch_page("http://127.0.0.1:9/set[1].bin", "0" * 64, tmp_path)


def test_fetch_page__gives_up_on_a_silent_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        assert fetch_page(address, "0" * 64, tmp_path) is None
