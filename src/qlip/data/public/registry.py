"""The public sets of images and weights that are fetched by name: what they are, getting one, opening one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlip.data.public import (
    cifar10,
    clipart,
    emoji,
    fashion_mnist,
    inception,
    lpips,
    paintings,
    quickdraw,
    resnet50,
    stamps,
    wallpapers,
)
from qlip.data.public.cache import Builder, building, cache_folder, read_manifest
from qlip.data.public.fetch import Package, reporter
from qlip.data.sources.tars import TarImages
from qlip.errors import QLIPError, nearest


@dataclass(frozen=True)
class PublicDataset:
    """A set of the registry.

    Attributes:
        name: what it is called by.
        description: one line.
        licence: of the images and words, as their carriers state it.
        splits: name -> what is in it; of weights there are none.
        download: bytes fetched, about.
        disk: bytes in the cache, about.
        build: writes it.
        weights: name -> what network it is.
        packaged: a package registry has it; what is not can only be had from its author's page.
    """

    name: str
    description: str
    licence: str
    splits: dict[str, str]
    download: int
    disk: int
    build: Callable[[Builder], None]
    weights: dict[str, str] = field(default_factory=dict)
    packaged: bool = True


def _licences(*packages: Package) -> str:
    return "; ".join(f"{package.name}: {package.licence}" for package in packages)


DATASETS = {
    info.name: info
    for info in (
        PublicDataset(
            "cifar10",
            "60,000 photographs of 32 px in ten classes (Krizhevsky, 2009)",
            cifar10.PACKAGE.licence,
            {"train": "50,000, label only", "test": "10,000, label only"},
            170_000_000,
            220_000_000,
            cifar10.build,
        ),
        PublicDataset(
            "emoji",
            "Noto, Fluent and Twemoji pictures of 64 to 128 px with names and tags",
            _licences(emoji.NOTO, emoji.TWEMOJI, emoji.FLUENT, emoji.OPENMOJI),
            {
                "train": "Noto and Fluent, nine concepts in ten",
                "test": "Noto and Fluent, the tenth concept: words never trained on",
                "twemoji": "all of Twemoji: a vendor never trained on",
                "twemoji-heldout": "Twemoji, the tenth concept: neither vendor nor words were trained on",
            },
            156_000_000,
            60_000_000,
            emoji.build,
        ),
        PublicDataset(
            "clipart",
            "Openclipart drawings of at most 160 px with title and keywords",
            _licences(clipart.PNG, clipart.SVG),
            {"train": "19 in 20", "test": "1 in 20, by hash of the key"},
            156_000_000,
            60_000_000,
            clipart.build,
        ),
        PublicDataset(
            "wallpapers",
            "wallpapers: 96 px crops at many scales, without words; two packages' photographs held out",
            _licences(*wallpapers.TRAIN, *wallpapers.TEST),
            {"train": "about 25,000 crops", "test": "held-out photographs, square, at most 512 px"},
            222_000_000,
            200_000_000,
            wallpapers.build,
        ),
        PublicDataset(
            "fashion-mnist",
            "70,000 grey pictures of clothes, 28 px, in ten classes (arXiv 1708.07747)",
            fashion_mnist.PACKAGE.licence,
            {"train": "60,000, label only", "test": "10,000, label only"},
            31_000_000,
            180_000_000,
            fashion_mnist.build,
        ),
        PublicDataset(
            "quickdraw",
            "34,500 sketches of 28 px in 345 classes (Quick, Draw!)",
            quickdraw.PACKAGE.licence,
            {"train": "80 a class, label only", "test": "20 a class, label only"},
            14_000_000,
            70_000_000,
            quickdraw.build,
        ),
        PublicDataset(
            "stamps",
            "Tux Paint's stamps: photographs and drawings of at most 160 px, a sentence each; to measure on",
            stamps.PACKAGE.licence,
            {"test": "about 780"},
            161_000_000,
            13_000_000,
            stamps.build,
        ),
        PublicDataset(
            "paintings",
            "174 works of the Metropolitan Museum, 306 to 555 px, with title, artist, medium and what they show",
            paintings.PACKAGE.licence,
            {"test": "all; nothing is trained on them"},
            22_000_000,
            22_000_000,
            paintings.build,
        ),
        PublicDataset(
            "lpips",
            "weights of LPIPS, a learned perceptual distance (arXiv 1801.03924); no pictures",
            lpips.PACKAGE.licence,
            {},
            64_000_000,
            69_000_000,
            lpips.build,
            {"vgg": "VGG16 and its linear layers", "alex": "AlexNet and its linear layers"},
        ),
        PublicDataset(
            "resnet50",
            "weights of Keras' ResNet-50 for ImageNet, for the distance fd_resnet50; no pictures",
            resnet50.PACKAGE.licence,
            {},
            95_000_000,
            103_000_000,
            resnet50.build,
            {"resnet50": "the network with its classifier"},
        ),
        PublicDataset(
            "inception",
            "weights of the Inception network of FID, from its port's page: no package has them; no pictures",
            inception.LICENCE,
            {},
            96_000_000,
            88_000_000,
            inception.build,
            {"inception": "the network without its classifier"},
            packaged=False,
        ),
    )
}
"""What `get` can fetch, by name."""


def get(name: str, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch a set into the cache, unless it is there; returns its folder.

    Args:
        name: one of `DATASETS`.
        cache_dir: instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.
        progress: show bars on stderr.

    Raises:
        QLIPError: no such set, nothing can be reached, a checksum differs, or the cache cannot be written.
    """
    info = _info(name)
    if read_manifest(info.name, cache_dir) is None:
        with reporter(progress) as report, building(info.name, cache_dir, report) as builder:
            info.build(builder)
            builder.finish(info.name, info.licence)
    return cache_folder(cache_dir) / "datasets" / info.name


def open_named(name: str, cache_dir: str | Path | None = None) -> TarImages:
    """Open ``set:split`` from the cache, e.g. ``cifar10:train``; it does not fetch.

    Raises:
        QLIPError: no such set or split, or it is not in the cache yet.
    """
    set_name, _, split = name.partition(":")
    info = _info(set_name)
    if not info.splits:
        raise QLIPError(f"{name}: holds weights, no pictures; see `qlip data list`")
    if split not in info.splits:
        splits = [f"{set_name}:{one}" for one in info.splits]
        raise QLIPError(f"{name}: no such split{nearest(name, splits)}; there are {', '.join(splits)}")
    manifest = read_manifest(set_name, cache_dir)
    folder = cache_folder(cache_dir) / "datasets" / set_name
    if manifest is None:
        raise QLIPError(f"{name}: not in {folder.parent}; fetch it with `qlip data get {set_name}`")
    shards = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    return TarImages(shards, name=name)


def _info(name: str) -> PublicDataset:
    if name not in DATASETS:
        raise QLIPError(f"{name}: no such data set{nearest(name, DATASETS)}; there are {', '.join(DATASETS)}")
    return DATASETS[name]
