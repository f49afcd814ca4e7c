"""Package archives of the tests' own making, of the names and the make that the real ones have."""

from __future__ import annotations

import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data import TarImages
from qlip.data.public.fetch import Package
from qlip.files import sha256_of


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def registered(package: Package, files: dict[str, bytes], archives: Path) -> Package:
    """The package with these files instead of its own, as an archive of the right name, and the checksum for it."""
    archive = tgz(archives / package.pattern, {f"package/{name}": data for name, data in files.items()})
    return replace(package, sha256=sha256_of(archive))


def keys(source: TarImages) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def debian(root: Path, archives: Path, package: Package) -> None:
    """Pack a tree as a Debian archive of another version than the pinned one."""
    control = root / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        f"Package: {package.name}\nVersion: 99\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    archive = archives / f"{package.name}_99_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", str(root), str(archive)], check=True, capture_output=True)
