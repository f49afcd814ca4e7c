"""Inputs of `qlip tokenize`, cut into shards; each shard becomes one part of the dataset.

Folders, public datasets and URL lists are cut in order into shards of so many images. A tar file is a shard. A
Parquet file is one shard, or several cut between its row groups. `find` returns `InputShards` of `InputShard`s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from qlip import assets
from qlip.archive.dataset.provenance import Kind, SourceRecord, SourceShard
from qlip.archive.tokenize.url_list import Fetching, Piece, UrlList, list_suffix, pieces
from qlip.archive.tokenize.url_table import UrlTable, count_rows
from qlip.data.public import DATASETS, open_named
from qlip.data.shards.shard_index import index_address, read_header
from qlip.data.shards.shard_patterns import expand
from qlip.data.sources.base import CaptionedImages, RawSample, printable
from qlip.data.sources.folder import FolderImages
from qlip.data.sources.open import is_tars
from qlip.data.sources.parquet import NoImagesError, ParquetImages, SeveralColumnsError, key_names, open_table
from qlip.data.sources.tars import TarImages
from qlip.data.storage.address import public_address
from qlip.data.storage.retry import DeniedError, MissingError, StorageError
from qlip.data.storage.storage import Storage, is_remote, local_path, split
from qlip.errors import QLIPError
from qlip.files import unnamed_file

SHARD_SIZE = 4096
FOLDER_SHARD = "pictures"
"""Name of a folder's shards in stored datasets."""
ROWS_AT_ONCE = 256
"""Rows of a Parquet file in memory."""
PARQUET = (".parquet", ".parquet}")


@dataclass(frozen=True)
class InputShard:
    """Images that become one part.

    Attributes:
        name: for messages and the manifest; independent of where the input lies.
        source: opens the images, in any process; pickles small.
        first, last: positions [first, last) of the source; `last` None is its end.
        count: number of images, if it is known without opening.
        digest: of the keys, 16 hex digits; or a file's size; or "".
        place: where it lies; in error messages only.
        retried: keys of the only images to read, which an earlier run could not; None is all.
    """

    name: str
    source: Callable[[], CaptionedImages]
    first: int = 0
    last: int | None = None
    count: int | None = None
    digest: str = ""
    place: str = ""
    retried: frozenset[str] | None = None

    @contextmanager
    def opened(self) -> Iterator[tuple[CaptionedImages, Sequence[int]]]:
        """Open the source; yields it with the shard's positions.

        Raises:
            QLIPError: it cannot be opened, or is shorter than it was.
        """
        try:
            images = self.source()
        except DeniedError as error:  # stores deny access to missing files, too
            raise QLIPError(str(error)) from None
        try:
            last = len(images) if self.last is None else self.last
            if last > len(images):
                raise QLIPError(f"{self.name}: now ends at image {len(images):,}; it changed after the run began")
            positions: Sequence[int] = range(self.first, last)
            if (retried := self.retried) is not None:
                exact = [one for one in positions if images.key(one) in retried]
                # keys of tables grow by folders where a table of the same name was added since
                positions = exact or [one for one in positions if not retried.isdisjoint(_tails(images.key(one)))]
            yield images, positions
        finally:
            images.close()


@dataclass(frozen=True)
class InputShards:
    """An input: its kind, the input as given, options of reading, and its shards."""

    kind: Kind
    given: str
    options: dict[str, str | int | None]
    shards: Sequence[InputShard]

    @property
    def num_images(self) -> int | None:
        """Images of all shards, if every count is known."""
        return count_images(self.shards)

    def record(self) -> SourceRecord:
        """Return the content of ``source.json``."""
        shards = tuple(SourceShard(name=one.name, images=one.count, digest=one.digest) for one in self.shards)
        return SourceRecord(kind=self.kind, input=self.given, options=self.options, shards=shards)


def count_images(shards: Iterable[InputShard]) -> int | None:
    """Return the number of images of shards, if every count is known."""
    counts = [shard.count for shard in shards]
    return None if None in counts else sum(count for count in counts if count is not None)


def find(
    given: str | Sequence[str],
    shard_size: int = SHARD_SIZE,
    caption_field: str | None = None,
    image_column: str | None = None,
    storage: Storage | None = None,
    fetching: Fetching | None = None,
    *,
    key_column: str | None = None,
    columns: Sequence[str] = (),
) -> InputShards:
    """Find the shards of an input.

    Args:
        given: a folder, ``name:split`` of a public dataset, tar or Parquet files (braces, globs), a URL list
            (``.txt``, ``.csv``, ``.tsv``, ``.jsonl``, or Parquet without images); paths, or addresses that fsspec
            knows. Several tars, Parquet files or public datasets may be given; of several datasets, keys begin with
            the dataset's name.
        shard_size: images per shard, for all but tar files.
        caption_field: field or column of the captions, if not the usual one.
        image_column: column of the images in Parquet files.
        storage: reads the files.
        fetching: limits of fetching the images of a URL list.
        key_column: column or JSON field that will be the keys of the rows.
        columns: columns or JSON fields that will be columns of the dataset.

    Raises:
        QLIPError: no such input, nothing in it, or an option that does not apply to it.
    """
    storage = storage or Storage()
    several = [given] if isinstance(given, str) else list(given)
    first = several[0]
    kind = _kind(several)
    options: dict[str, str | int | None] = {"caption_field": caption_field, "shard_size": shard_size}
    if image_column is not None and kind != "parquet":
        raise QLIPError(f"{first}: has no image column; only Parquet files have one")
    extra = tuple(dict.fromkeys([*columns, *([] if key_column is None else [key_column])]))
    if "" in extra:
        raise QLIPError(f"{first}: the name of a column to read is empty; give a name")
    if kind == "set":
        if caption_field is not None:
            raise QLIPError(f"{first}: a public dataset has no other caption field; leave it out")
        shards = [shard for one in several for shard in _of_set(one, shard_size, apart=len(several) > 1)]
    elif kind == "tars":
        shards, options = _of_tars(several, caption_field, storage), {"caption_field": caption_field}
    elif kind == "parquet":
        try:
            shards = _of_parquet(several, shard_size, caption_field, image_column, storage, extra)
            options["image_column"] = image_column
        except NoImagesError:
            kind, shards = "addresses", _of_tables(several, shard_size, caption_field, storage, fetching, extra)
    elif kind == "addresses":
        address = _absolute(first)
        cut = pieces(address, shard_size, storage, extra)
        shards = [_of_list(address, piece, caption_field, storage, fetching) for piece in cut]
    else:
        shards = _of_folder(first, shard_size, caption_field, extra)
    if key_column is not None:
        options["key_column"] = key_column
    return InputShards(kind, printable(" ".join(map(public_address, several))), options, shards)


def _kind(several: Sequence[str]) -> Kind:
    """Return the kind of input, by the names alone."""
    first = several[0]
    if len(several) > 1:
        if all(is_tars(one) for one in several):
            return "tars"
        if all(one.endswith(PARQUET) for one in several):
            return "parquet"
        if all(is_set(one) for one in several) and len(set(several)) == len(several):
            return "set"
        raise QLIPError(
            f"{first}, {several[1]}, ...: several inputs must all be .tar, all .parquet or different public datasets;"
            " else give one folder, or merge datasets with `qlip tokens merge`"
        )
    path = first.partition("?")[0] if is_remote(first) else first
    if is_set(first):
        return "set"
    if is_tars(first):
        return "tars"
    if path.endswith(PARQUET):
        return "parquet"
    if list_suffix(first) and (is_remote(first) or not local_path(first).is_dir()):
        return "addresses"
    return "folder"


def is_set(given: str) -> bool:
    """Return whether an input names a public dataset: ``cifar10:test``."""
    return not is_remote(given) and given.partition(":")[0] in DATASETS and not os.path.exists(given)


def _of_folder(given: str, shard_size: int, caption_field: str | None, extra: tuple[str, ...]) -> list[InputShard]:
    if given == "bundled":
        images = FolderImages(assets.path("images"), caption_field, name=given, records=bool(extra))
    else:
        folder = given if is_remote(given) else local_path(given)
        if isinstance(folder, Path) and folder.is_file():
            raise QLIPError(f"{given}: one file; give its folder, or use `qlip encode`")
        try:
            images = FolderImages(_absolute(given), caption_field, records=bool(extra))
        except QLIPError as error:
            raise _with_hint(given, error) from None
    for name in () if images.remote else extra:
        if not any(name in images.record(index) for index in range(len(images))):
            found = sorted({field for index in range(min(16, len(images))) for field in images.record(index)})
            raise QLIPError(f"{given}: no image has a field {name!r}; the first ones have {', '.join(found) or 'none'}")
    shards = []
    for first, last in _ranges(len(images), shard_size):
        part = images.part(first, last)
        digest = _digest([part.key(index) for index in range(len(part))])
        name = f"{FOLDER_SHARD} {first} to {last - 1}"
        shards.append(InputShard(name, partial(_itself, part), count=last - first, digest=digest, place=images.path))
    return shards


def _with_hint(given: str, error: QLIPError) -> QLIPError:
    """Add how to write a folder of tars or Parquet files as an input."""
    if not is_remote(given):
        for suffix in (".tar", ".parquet"):
            if any(local_path(given).glob(f"*{suffix}")):
                return QLIPError(f"{given}: holds {suffix} files and no images; write '{given.rstrip('/')}/*{suffix}'")
    return error


def _of_set(given: str, shard_size: int, apart: bool) -> list[InputShard]:
    source = partial(_set, given, apart)
    images = source()
    shards = []
    for first, last in _ranges(len(images), shard_size):
        digest = _digest([images.key(index) for index in range(first, last)])
        name = f"{given} {first} to {last - 1}"
        shards.append(InputShard(name, source, first, last, last - first, digest))
    return shards


def _of_tars(given: Sequence[str], caption_field: str | None, storage: Storage) -> list[InputShard]:
    tars = [_absolute(tar) for one in given for tar in expand(one, storage)]
    shards = []
    for tar, name in zip(tars, _short(tars), strict=True):
        digest = "" if is_remote(tar) else str(storage.size(tar))
        source, count = partial(_tar, tar, caption_field), _indexed(tar, storage)
        shards.append(InputShard(name, source, count=count, digest=digest, place=public_address(tar)))
    return shards


def _indexed(tar: str, storage: Storage) -> int | None:
    """Return the number of images by the index beside a local tar; a store would take a request per shard."""
    if is_remote(tar):
        return None
    try:
        return read_header(index_address(tar), storage).samples
    except MissingError:
        return None


def _of_parquet(
    given: Sequence[str],
    shard_size: int,
    caption_field: str | None,
    image_column: str | None,
    storage: Storage,
    extra: tuple[str, ...],
) -> list[InputShard]:
    files = [_absolute(file) for one in given for file in expand(one, storage)]
    names = dict(zip(files, zip(_short(files), key_names(files), strict=True), strict=True))

    def look(file: str) -> tuple[list[int] | QLIPError, int]:
        try:
            return _parquet(file, *names[file], caption_field, image_column, extra).chunk_sizes(), storage.size(file)
        except (StorageError, DeniedError, SeveralColumnsError):
            raise
        except QLIPError as error:
            return error, storage.size(file)

    shards, looked = [], storage.map(look, files)
    broken = [runs for runs, _ in looked if isinstance(runs, QLIPError)]
    if len(broken) == len(files):
        raise next((error for error in broken if not isinstance(error, NoImagesError)), broken[0])
    for file, (runs, size) in zip(files, looked, strict=True):
        name, digest = names[file][0], str(size)
        open_file = partial(_parquet, file, *names[file], caption_field, image_column, extra)
        if isinstance(runs, QLIPError):  # fails when the run opens it, and the others go on
            shards.append(InputShard(name, open_file, digest=digest, place=public_address(file)))
            continue
        cuts = list(_packed(runs, shard_size))
        for first, last in cuts:
            shown = name if len(cuts) == 1 else f"{name} {first} to {last - 1}"
            shards.append(InputShard(shown, open_file, first, last, last - first, digest, public_address(file)))
    return shards


def _of_list(
    address: str, piece: Piece, caption_field: str | None, storage: Storage, fetching: Fetching | None
) -> InputShard:
    name = f"addresses {piece.first} to {piece.first + piece.rows - 1}"
    source = partial(UrlList, address, piece, caption_field, storage, fetching)
    return InputShard(name, source, count=piece.rows, digest=piece.digest, place=public_address(split(address)[0]))


def _of_tables(
    given: Sequence[str],
    shard_size: int,
    caption_field: str | None,
    storage: Storage,
    fetching: Fetching | None,
    extra: tuple[str, ...],
) -> list[InputShard]:
    files, shards = [_absolute(file) for one in given for file in expand(one, storage)], []
    for file, name, rows in zip(files, _short(files), storage.map(count_rows, files), strict=True):
        digest = str(storage.size(file))
        for first, last in _ranges(rows, shard_size):
            source = partial(UrlTable, file, first, last - first, caption_field, fetching, extra)
            place = public_address(split(file)[0])
            shards.append(InputShard(f"{name} {first} to {last - 1}", source, 0, None, last - first, digest, place))
    if not shards:
        raise QLIPError(f"{public_address(files[0])}: has no row; give tables with URLs of images")
    for name in extra:
        if not any(name in open_table(file).schema_arrow.names for file in files):
            found = ", ".join(open_table(files[0]).schema_arrow.names)
            raise QLIPError(f"{public_address(files[0])}: no column {name!r}; it has {found}")
    return shards


def _tails(key: str) -> Iterator[str]:
    """Yield a key without its first folder, without its first two, and so on."""
    while "/" in key:
        key = key.partition("/")[2]
        yield key


def _itself(images: CaptionedImages) -> CaptionedImages:
    return images


@lru_cache(maxsize=2)
def _set(name: str, apart: bool) -> CaptionedImages:
    return _OfASet(name) if apart else open_named(name)


class _OfASet(CaptionedImages):
    """A public dataset beside others: keys begin with its name, since two of them may use the same keys."""

    def __init__(self, name: str) -> None:
        self.name, self._images = name, open_named(name)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return f"{self.name}/{self._images.key(index)}"

    def read(self, index: int) -> RawSample:
        return replace(self._images.read(index), key=self.key(index))


def _tar(address: str, caption_field: str | None) -> CaptionedImages:
    return _FetchedTar(address, caption_field) if is_remote(address) else TarImages(address, caption_field)


def _parquet(
    address: str,
    name: str,
    key_name: str,
    caption_field: str | None,
    image_column: str | None,
    extra: tuple[str, ...],
) -> CaptionedImages:
    how = {"image_field": image_column, "window": ROWS_AT_ONCE, "key_name": key_name, "columns": extra}
    return ParquetImages(address, caption_field, name, **how)  # type: ignore[arg-type]


class _FetchedTar(TarImages):
    """A remote tar, copied to this machine while it is read, so that no index is needed."""

    def __init__(self, address: str, caption_field: str | None) -> None:
        with ExitStack() as stack:
            file, path = stack.enter_context(unnamed_file())
            Storage().copy(address, file)
            file.flush()
            try:
                super().__init__(path, caption_field, name=address)
            except QLIPError as error:
                raise QLIPError(str(error).replace(path, public_address(address))) from None
            self._kept = stack.pop_all()

    def files(self, index: int) -> tuple[str, str, bytes, bytes | None, bytes | None, bytes | None]:
        key, _, image, text, record, cls = super().files(index)
        return key, f"{self.name}: {key}", image, text, record, cls

    def close(self) -> None:
        super().close()
        self._kept.close()


def _ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, count)) for first in range(0, count, size))


def _packed(groups: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole groups of at most `size` rows, or of one larger group."""
    first = last = 0
    for group in groups:
        if last > first and last + group - first > size:
            yield first, last
            first = last
        last += group
    if last > first:
        yield first, last


def _absolute(address: str) -> str:
    """Return an absolute path, for workers run in other folders."""
    return address if is_remote(address) else str(local_path(address).absolute())


def _short(addresses: Sequence[str]) -> list[str]:
    """Return the addresses without their common folder and without secrets: presigned ones keep their names."""
    addresses = [public_address(address) for address in addresses]
    common = os.path.commonprefix(addresses)
    cut = common.rfind("/") + 1
    return [printable(address[cut:]) for address in addresses]


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()[:16]
