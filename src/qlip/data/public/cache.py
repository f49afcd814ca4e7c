"""The cache: one folder a set, tar shards by split (or weights) and a manifest, written once and then only read."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip.data.public.fetch import Fetched, Reporter
from qlip.errors import QLIPError
from qlip.files import sha256_of

MANIFEST = "manifest.json"
SHARD_SAMPLES = 10_000


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where data sets lie: `cache_dir`, else ``$QLIP_CACHE``, else ``~/.cache/qlip``."""
    return Path(cache_dir or os.environ.get("QLIP_CACHE") or Path.home() / ".cache" / "qlip")


@dataclass
class SplitWriter:
    """Samples of one split into numbered shards, in the order given; the same bytes each time."""

    folder: Path
    split: str
    count: int = 0
    _tar: tarfile.TarFile | None = None
    _keys: set[str] = field(default_factory=set)

    def add(self, key: str, suffix: str, image: bytes, captions: Sequence[str] = (), label: str | None = None) -> None:
        """One image (an encoded file) with its words, as KEY.SUFFIX and KEY.json."""
        assert "." not in key and "/" not in key and key not in self._keys, key
        self._keys.add(key)
        if self.count % SHARD_SAMPLES == 0:
            self.close()
            shard = self.folder / f"{self.split}-{self.count // SHARD_SAMPLES:03d}.tar"
            self._tar = tarfile.open(shard, "w")  # noqa: SIM115 - stays open until the shard is full
        words: dict[str, object] = {} if label is None else {"label": label}
        if captions:
            words["captions"] = list(captions)
        self._file(f"{key}.{suffix}", image)
        if words:
            self._file(f"{key}.json", json.dumps(words, ensure_ascii=False).encode())
        self.count += 1

    def close(self) -> None:
        """End the last shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _file(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


@dataclass
class Builder:
    """What a data set's recipe writes to.

    Attributes:
        folder: the set under construction.
        raw: scratch space for archives and what is in them, removed afterwards.
        report: progress.
        sources: the archives used, for the manifest.
        files: names of what else lies in `folder`, e.g. weights; their checksums go into the manifest.
    """

    folder: Path
    raw: Path
    report: Reporter
    sources: list[Fetched] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _splits: dict[str, SplitWriter] = field(default_factory=dict)

    def split(self, name: str) -> SplitWriter:
        """The writer of a split, made when it is first asked for."""
        return self._splits.setdefault(name, SplitWriter(self.folder, name))

    def finish(self, name: str, licence: str) -> None:
        """Close the shards and write the manifest."""
        splits = {}
        for split, writer in self._splits.items():
            writer.close()
            shards = sorted(self.folder.glob(f"{split}-[0-9][0-9][0-9].tar"))
            splits[split] = {
                "samples": writer.count,
                "shards": [{"file": shard.name, "sha256": sha256_of(shard)} for shard in shards],
            }
        sources = [{"origin": one.origin, "sha256": one.sha256} for one in self.sources]
        manifest = {"name": name, "licence": licence, "sources": sources, "splits": splits}
        if self.files:
            manifest["files"] = [{"file": file, "sha256": sha256_of(self.folder / file)} for file in self.files]
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def building(name: str, cache_dir: str | Path | None, report: Reporter) -> Iterator[Builder]:
    """A set built aside, put in its place when the block ends well; an interrupted one leaves nothing."""
    home = cache_folder(cache_dir) / "datasets"
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    except OSError as error:
        raise QLIPError(f"{home}: {error.strerror or error}; set QLIP_CACHE to a folder you may write to") from None
    try:
        builder = Builder(aside / "set", aside / "raw", report)
        builder.folder.mkdir()
        builder.raw.mkdir()
        try:
            yield builder
        except OSError as error:
            remedy = "free the disk, or set QLIP_CACHE to another folder"
            raise QLIPError(f"{home}: {name} cannot be written ({error.strerror or error}); {remedy}") from None
        _put_in_place(builder.folder, home / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(folder: Path, place: Path) -> None:
    if (place / MANIFEST).is_file():
        return  # another process was faster, and built the same
    shutil.rmtree(place, ignore_errors=True)  # without a manifest it is nothing of ours
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise QLIPError(f"{place}: {error.strerror or error}; remove it and try again") from None


def read_manifest(name: str, cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """The manifest of a set in the cache, or None where it is not there."""
    path = cache_folder(cache_dir) / "datasets" / name / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise QLIPError(f"{path}: cannot be read ({error}); remove the folder and get the set again") from None
    assert isinstance(manifest, dict)
    return manifest


def verified_file(name: str, file: str, cache_dir: str | Path | None = None) -> Path:
    """A file of a set in the cache, its checksum just compared with the manifest's.

    Raises:
        QLIPError: the set is not in the cache, or the file is another one than was written.
    """
    manifest = read_manifest(name, cache_dir)
    folder = cache_folder(cache_dir) / "datasets" / name
    if manifest is None:
        raise QLIPError(f"{name}: not in {folder.parent}; fetch it with `qlip data get {name}`")
    (known,) = (entry["sha256"] for entry in manifest["files"] if entry["file"] == file)
    try:
        found = sha256_of(folder / file)
    except OSError as error:
        raise QLIPError(f"{folder / file}: {error.strerror}; remove {folder} and get {name} again") from None
    if found != known:
        raise QLIPError(f"{folder / file}: is damaged (its SHA-256 is another); remove {folder} and get {name} again")
    return folder / file
