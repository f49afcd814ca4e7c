"""The cache of public datasets: a folder per dataset, written once as a whole and then only read."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlip.data.public.builder import MANIFEST, Builder
from qlip.errors import QLIPError
from qlip.files import cache_folder, sha256_of


def dataset_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """Folder of a dataset in the cache; it may not exist."""
    return cache_folder(cache_dir) / "datasets" / name


@contextmanager
def building(name: str, cache_dir: str | Path | None = None, *, quiet: bool = False) -> Iterator[Builder]:
    """Build a dataset aside and move it into its place on success; an interrupted build leaves nothing.

    Raises:
        QLIPError: the cache cannot be written.
    """
    place = dataset_folder(name, cache_dir)
    home = place.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    except OSError as error:
        raise QLIPError(f"{home}: {error.strerror or error}; set QLIP_CACHE to a folder you may write to") from None
    try:
        builder = Builder(aside / "set", aside / "raw", quiet)
        builder.folder.mkdir()
        builder.raw.mkdir()
        try:
            yield builder
        except OSError as error:
            remedy = "free the disk, or set QLIP_CACHE to another folder"
            raise QLIPError(f"{home}: {name} cannot be written ({error.strerror or error}); {remedy}") from None
        _put_in_place(builder.folder, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(folder: Path, place: Path) -> None:
    if (place / MANIFEST).is_file():
        return  # another process was faster, and built an equal one
    shutil.rmtree(place, ignore_errors=True)  # without a manifest it is no dataset
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise QLIPError(f"{place}: {error.strerror or error}; remove it and try again") from None


def read_manifest(name: str, cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """The manifest of a dataset in the cache, or None if it is not there."""
    path = dataset_folder(name, cache_dir) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise QLIPError(f"{path}: cannot be read ({error}); remove the folder and get the dataset again") from None
    assert isinstance(manifest, dict)
    return manifest


def required_manifest(name: str, where: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """The manifest of a dataset in the cache. Raises QLIPError, which begins with `where`, if it is not there."""
    manifest = read_manifest(name, cache_dir)
    if manifest is None:
        folder = dataset_folder(name, cache_dir).parent
        raise QLIPError(f"{where}: not in {folder}; fetch it with `qlip data get {name}`")
    return manifest


def verified_file(name: str, file: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a file of a dataset in the cache, after comparing its checksum with the manifest's.

    Raises:
        QLIPError: the dataset is not in the cache, or the file was changed.
    """
    manifest, folder = required_manifest(name, name, cache_dir), dataset_folder(name, cache_dir)
    (known,) = (entry["sha256"] for entry in manifest["files"] if entry["file"] == file)
    try:
        found = sha256_of(folder / file)
    except OSError as error:
        raise QLIPError(f"{folder / file}: {error.strerror}; remove {folder} and get {name} again") from None
    if found != known:
        raise QLIPError(f"{folder / file}: is damaged (its SHA-256 is another); remove {folder} and get {name} again")
    return folder / file
