"""Opening a source by its path: which class reads it follows from how the path ends."""

from __future__ import annotations

from qlip import assets
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.folder import FolderImages
from qlip.data.sources.karpathy import is_karpathy, open_karpathy
from qlip.data.sources.npz import NpzImages
from qlip.data.sources.parquet import ParquetImages
from qlip.data.sources.tars import TarImages
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import is_remote, local_path
from qlip.errors import QLIPError


def open_path(
    path: str,
    caption_field: str | None = None,
    *,
    index: str | None = None,
    retry: RetryPolicy | None = None,
    block_size: int | None = None,
    window: int | None = None,
) -> CaptionedImages:
    """Open a folder of images, tar shards, parquet tables or a caption file; its name is the path.

    Args:
        path: ``bundled`` for the package's eighteen images, captioned and labelled; tar shards end in ``.tar`` (braces
            and globs are expanded), tables in ``.parquet``, caption files of COCO or Flickr30k as Karpathy split them
            in ``.json`` or ``.json:SPLIT``, arrays of images in ``.npz``; everything else is a folder.
        caption_field: field or column of the caption; by default ``caption`` and the list ``captions``.
        index: folder of the index files of tars.
        retry: for remote sources.
        block_size: samples per block, if tars are read by blocks.
        window: blocks, or row groups of tables, that are read in turns.

    Raises:
        QLIPError: it is not there, or cannot be read.
    """
    if path == "bundled":
        return FolderImages(assets.path("images"), caption_field, name=path)
    if is_tars(path):
        kept = 2 * (window or 0) if block_size is not None else 0
        return TarImages(
            path, caption_field, name=path, index=index, retry=retry, block_size=block_size, keep_blocks=kept
        )
    if is_karpathy(path) and not is_remote(path):
        return open_karpathy(path)
    if path.endswith(".npz") and not is_remote(path):
        if caption_field is not None:
            raise QLIPError(f"{path}: has no captions, and caption field {caption_field!r} was asked for")
        return NpzImages(path)
    if is_table(path):
        return ParquetImages(path, caption_field, name=path, keep=window or 1)
    if not is_remote(path) and local_path(path).is_file():
        raise QLIPError(f"{path}: neither a folder nor a .tar file; give a folder of images or tar shards")
    return FolderImages(path, caption_field, name=path, retry=retry)


def is_tars(path: str) -> bool:
    """True for a path or address of tar shards."""
    return (path.partition("?")[0] if is_remote(path) else path).endswith((".tar", ".tar}"))


def is_table(path: str) -> bool:
    """True for a local path of parquet tables."""
    return path.endswith(".parquet") and not is_remote(path)
