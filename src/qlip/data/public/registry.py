"""The public datasets by name: fetching one into the cache, opening one from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlip.data.public import (
    cifar10,
    clipart,
    emoji,
    fashion_mnist,
    icons,
    inception,
    lpips,
    paintings,
    quickdraw,
    resnet50,
    scene_captions,
    smollm2,
    stamps,
    wallpapers,
)
from qlip.data.public.builder import PublicDataset, text_file
from qlip.data.public.cache import building, dataset_folder, read_manifest, required_manifest
from qlip.data.public.texts import anarchism, sotu, wordnet
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.tars import TarImages
from qlip.errors import QLIPError
from qlip.registry import Registry, unknown_name

_IMAGES = (cifar10, emoji, clipart, wallpapers, icons, scene_captions, fashion_mnist, quickdraw, stamps, paintings)
_TEXTS = (sotu, wordnet, anarchism)
_WEIGHTS = (lpips, resnet50, inception, smollm2)
DATASETS = Registry[PublicDataset]("dataset", {one.DATASET.name: one.DATASET for one in (*_IMAGES, *_TEXTS, *_WEIGHTS)})
"""Everything that `get` can fetch, by name."""


def get(name: str, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch a dataset into the cache, unless it is there already; returns its folder.

    Args:
        name: one of `DATASETS`.
        cache_dir: instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.
        progress: show bars on stderr.

    Raises:
        QLIPError: no such dataset, nothing to fetch, nothing can be reached, a checksum differs, or the cache cannot
            be written.
    """
    dataset = DATASETS.find(name)
    if dataset.build is None:
        raise QLIPError(f"{name}: is drawn when it is read; there is nothing to fetch")
    if read_manifest(name, cache_dir) is None:
        with building(name, cache_dir, quiet=not progress) as builder:
            dataset.build(builder)
            builder.finish(name, dataset.licence)
    return dataset_folder(name, cache_dir)


def is_here(name: str, cache_dir: str | Path | None = None) -> bool:
    """Return whether a dataset needs no fetching: it is in the cache, or is drawn when it is read."""
    return DATASETS.find(name).build is None or read_manifest(name, cache_dir) is not None


def require_datasets(names: Iterable[str], cache_dir: str | Path | None = None) -> None:
    """Check that all datasets and weights that a command needs are in the cache, before it begins.

    Args:
        names: of `DATASETS`.
        cache_dir: instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.

    Raises:
        QLIPError: some are not; it names them with their sizes and package clients.
    """
    wanted = [DATASETS.find(name) for name in dict.fromkeys(names)]
    absent = [one for one in wanted if not is_here(one.name, cache_dir)]
    if not absent:
        return
    places = {one.name: ", ".join(dict.fromkeys(package.client for package in one.packages)) for one in absent}
    each = (f"{one.name} ({one.download / 1e6:.0f} MB, {places[one.name] or 'a web page'})" for one in absent)
    total = f"{sum(one.download for one in absent) / 1e6:.0f} MB"
    fetch = f"qlip data get {' '.join(one.name for one in absent)}"
    folder = dataset_folder(absent[0].name, cache_dir).parent
    raise QLIPError(f"not in {folder}: {', '.join(each)}; fetch {total} with `{fetch}`")


def open_named(name: str, cache_dir: str | Path | None = None) -> CaptionedImages:
    """Open ``dataset:split``, such as ``cifar10:train``, from the cache; never fetches it.

    Raises:
        QLIPError: no such dataset or split, or it is not in the cache yet.
    """
    dataset_name, _, split = name.partition(":")
    dataset = DATASETS.find(dataset_name)
    splits = [f"{dataset_name}:{one}" for one in dataset.splits]
    if not splits:
        raise QLIPError(f"{name}: holds {'texts' if dataset.texts else 'weights'}, no images; see `qlip data list`")
    if name not in splits:
        raise unknown_name(name, "split", splits)
    if dataset.draw is not None:
        return dataset.draw(split)
    manifest = required_manifest(dataset_name, name, cache_dir)
    folder = dataset_folder(dataset_name, cache_dir)
    return TarImages([folder / shard["file"] for shard in manifest["splits"][split]["shards"]], name=name)


def find_texts(name: str, cache_dir: str | Path | None = None) -> Path:
    """Find the JSON Lines of ``dataset:split``, such as ``sotu:test``, in the cache; never fetches them.

    Each line is an object with ``key`` and ``text``, a document.

    Raises:
        QLIPError: no such dataset or split of texts, or it is not in the cache yet.
    """
    dataset_name, _, split = name.partition(":")
    dataset = DATASETS.find(dataset_name)
    splits = [f"{dataset_name}:{one}" for one in dataset.texts]
    if not splits:
        holders = ", ".join(one.name for one in DATASETS.values() if one.texts)
        raise QLIPError(f"{name}: holds no texts; there are {holders}")
    if name not in splits:
        raise unknown_name(name, "split", splits)
    required_manifest(dataset_name, name, cache_dir)
    return dataset_folder(dataset_name, cache_dir) / text_file(split)
