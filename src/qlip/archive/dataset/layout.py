"""Files of a token dataset, and how a part is added atomically.

::

    DATASET/
      dataset.json            DatasetInfo
      source.json             the input and its shards: a run resumes only with the same input
      source.sums.json        its size and checksums; early datasets have none
      data/part-00007.parquet the rows of input shard 7
      manifest/part-00007.json written after it: a part without this entry does not exist
      manifest.jsonl          all entries in order, written at the end of a run, where readers begin
      errors.parquet          images that could not be read, with the reason; written at the end of a run too
      README.md               the dataset's card

A part is written, then its entry. After a kill between the two the part is made again, with the same bytes. Where a
part is replaced, an entry that also holds the old one is written first, so after a kill either part is known.
`Layout` holds the addresses, `Entry` is a part's line in the manifest.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qlip.archive.dataset.schema import DatasetInfo, Fingerprint
from qlip.data.storage.retry import MissingError
from qlip.data.storage.storage import Storage, is_remote, join, local_path
from qlip.errors import QLIPError, require, validate_json
from qlip.runtime.workspace import Workspace
from qlip.tokens.entropy.tables import FILE

INFO, SOURCE, MANIFEST, ERRORS, CARD = "dataset.json", "source.json", "manifest.jsonl", "errors.parquet", "README.md"
SUMS = "source.sums.json"
ROW_GROUP = 1024
"""Rows per row group at most."""

Content = bytes
"""Name for `bytes` inside classes that have a field of that name."""


class Sums(BaseModel):
    """Size and checksums of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Fingerprint
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


class SkippedImage(BaseModel):
    """An image that could not be read and is in no row.

    Attributes:
        key: name of the image inside its shard.
        reason: one line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    reason: str


class Entry(BaseModel):
    """Manifest entry of one part.

    Attributes:
        part: number of the part and of its input shard.
        shard: name of the input shard.
        inputs: images in the shard: distinct keys of the rows plus errors.
        rows: rows in the part.
        bytes, sha256, crc32: size and checksums of the part's file.
        errors: images that were skipped.
        before: entry of the part that this one replaces, while that is not finished; else None, and not in the JSON.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: Annotated[int, Field(ge=0)]
    shard: str
    inputs: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Fingerprint
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    errors: tuple[SkippedImage, ...] = ()
    before: Entry | None = Field(default=None, exclude_if=lambda value: value is None)

    def describes(self, data: Content) -> bool:
        """Return whether these are the bytes that were written."""
        return hashlib.sha256(data).hexdigest() == self.sha256


class Totals(NamedTuple):
    """Sums over parts; `skipped` of the images are in no row."""

    parts: int
    rows: int
    images: int
    skipped: int
    bytes: int


class Layout:
    """Files of one dataset.

    Args:
        address: folder: a path, or an address that fsspec knows.
        storage: reads and writes the files.
    """

    def __init__(self, address: str, storage: Storage | None = None) -> None:
        self.address = str(address) if is_remote(address) else str(local_path(address))
        self.storage = storage or Storage()

    def path(self, name: str) -> str:
        """Return the address of a file in the folder."""
        return join(self.address, name)

    def part_path(self, part: int) -> str:
        """Return the address of a part's rows."""
        return self.path(f"data/{part_name(part)}.parquet")

    def entry_path(self, part: int) -> str:
        """Return the address of a part's manifest entry."""
        return self.path(f"manifest/{part_name(part)}.json")

    def workspace(self, plan: Mapping[str, object], *, of: str, record: str) -> Workspace:
        """Return the folder as resumable work; see `Workspace`."""
        return Workspace(
            self.address, plan, of=of, record=record, files=self.storage if is_remote(self.address) else None
        )

    def exists(self) -> bool:
        """Return whether a dataset was begun here."""
        return self.storage.exists(self.path(INFO))

    def check_empty(self) -> None:
        """Check that a dataset can begin here without replacing other files.

        Raises:
            QLIPError: there are files other than those that a run writes before its `DatasetInfo`.
        """
        if is_remote(self.address):
            found = [name for name in (CARD, "data", MANIFEST) if self.storage.exists(self.path(name))]
        else:
            folder = local_path(self.address)
            if folder.exists() and not folder.is_dir():
                raise QLIPError(f"{self.address}: is a file; give a folder for the dataset")
            names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            found = [name for name in names if name not in (SOURCE, SUMS, FILE) and not name.startswith(".")]
        if found:
            raise QLIPError(f"{self.address}: holds {found[0]!r} and no token dataset; give a new or an empty folder")

    def read_info(self) -> DatasetInfo:
        """Read ``dataset.json``. Raises QLIPError: no dataset here, or one of a newer version."""
        if not self.exists():
            raise QLIPError(f"{self.address}: no token dataset; give a folder that `qlip tokenize` wrote")
        return DatasetInfo.from_json(self.storage.read(self.path(INFO)), self.path(INFO))

    def write_info(self, info: DatasetInfo) -> None:
        """Write ``dataset.json``, before the first part and after ``source.json``, whose checksums are written too."""
        source = self.path(SOURCE)
        if self.storage.exists(source):
            self.storage.write(self.path(SUMS), sums_bytes(self.storage.read(source)))
        self.storage.write(self.path(INFO), (info.to_json() + "\n").encode())

    def renew_sums(self) -> None:
        """Write the checksums of ``source.json`` again if they are another one's: a run was killed between the two."""
        source, sums = self.path(SOURCE), self.path(SUMS)
        if self.storage.exists(sums) and self.storage.read(sums) != (wanted := sums_bytes(self.storage.read(source))):
            self.storage.write(sums, wanted)

    def write_part(
        self,
        info: DatasetInfo,
        part: int,
        shard: str,
        inputs: int,
        table: Any,
        errors: Sequence[SkippedImage] = (),
        before: Entry | None = None,
    ) -> Entry:
        """Add or replace a part: its rows, then its entry.

        Args:
            info: of the dataset.
            part, shard, inputs: as in `Entry`.
            table: a pyarrow table of the schema `arrow_schema(info)`.
            errors: images that were skipped.
            before: entry of the part that is replaced.

        Raises:
            QLIPError: the storage cannot be written, or is full; the dataset is unchanged.
        """
        data = parquet_bytes(table)
        entry = Entry(
            part=part,
            shard=shard,
            inputs=inputs,
            rows=table.num_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            crc32=zlib.crc32(data),
            errors=tuple(errors),
        )
        if before is not None:
            self.storage.write(self.entry_path(part), entry_bytes(entry.model_copy(update={"before": before})))
        self.storage.write(self.part_path(part), data)
        self.storage.write(self.entry_path(part), entry_bytes(entry))
        return entry

    def written(self) -> dict[int, Entry]:
        """Return all entries of the manifest folder by part, as they were written."""
        paths = self.storage.glob(self.path("manifest/part-*.json"))
        entries = self.storage.map(lambda path: _entry(self.storage.read(path), path), paths)
        return {entry.part: entry for entry in sorted(entries, key=lambda entry: entry.part)}

    def settled(self, entry: Entry) -> Entry:
        """Return an entry; of a part whose replacing was interrupted, the one that describes the rows there are."""
        if entry.before is None:
            return entry
        path = self.part_path(entry.part)
        replaced = self.storage.exists(path) and entry.describes(self.storage.read(path))
        return entry.model_copy(update={"before": None}) if replaced else entry.before

    def finished(self) -> dict[int, Entry]:
        """Return the entries of all finished parts by part."""
        return {part: self.settled(entry) for part, entry in self.written().items()}

    def present(self, entries: Iterable[Entry]) -> dict[int, Entry]:
        """Return the entries by part whose file is there and has the entry's size."""
        paths = {self.part_path(entry.part): entry for entry in entries}

        def size(path: str) -> int:
            try:
                return self.storage.size(path)
            except MissingError:
                return -1

        sizes = self.storage.map(size, list(paths))
        return {entry.part: entry for entry, found in zip(paths.values(), sizes, strict=True) if found == entry.bytes}

    def write_manifest(self, entries: Sequence[Entry]) -> None:
        """Write ``manifest.jsonl`` and ``errors.parquet``."""
        self.storage.write(self.path(ERRORS), errors_bytes(entries))
        self.storage.write(self.path(MANIFEST), b"".join(entry_bytes(entry) for entry in entries))

    def remove_leftovers(self) -> None:
        """Remove temporary files of writers that were killed."""
        if not is_remote(self.address):
            for folder in (local_path(self.address), *(local_path(self.path(name)) for name in ("data", "manifest"))):
                for path in folder.glob(".*.part"):
                    path.unlink(missing_ok=True)

    def manifest(self) -> list[Entry]:
        """Return all entries in order.

        Raises:
            QLIPError: no part is finished, or the file is no manifest.
        """
        path = self.path(MANIFEST)
        if not self.storage.exists(path):
            found = self.finished()
            if not found:
                raise QLIPError(f"{self.address}: no part is finished; run the same `qlip tokenize` again")
            return list(found.values())
        return [_entry(line, path) for line in self.storage.read(path).splitlines() if line.strip()]


def part_name(part: int) -> str:
    """Name of a part's files, without suffix."""
    return f"part-{part:05d}"


def totals(entries: Sequence[Entry]) -> Totals:
    """Return the sums over parts."""
    return Totals(
        len(entries),
        sum(entry.rows for entry in entries),
        sum(entry.inputs for entry in entries),
        sum(len(entry.errors) for entry in entries),
        sum(entry.bytes for entry in entries),
    )


def digest(entries: Sequence[Entry]) -> str:
    """SHA-256 (hex) over the SHA-256 of the parts, in order."""
    return hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()


def manifest_fingerprint(entries: Sequence[Entry]) -> str:
    """SHA-256 (hex) over numbers, rows and SHA-256 of the parts, in order; what a search index was built from."""
    lines = (f"{entry.part} {entry.rows} {entry.sha256}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parquet_bytes(table: Any) -> bytes:
    """Write a table as a Parquet file: equal tables give equal bytes. Packed bits are stored uncompressed."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    sink = arrow.BufferOutputStream()
    incompressible = ("tokens", "embedding.list.element")
    compression = {name: "none" if name in incompressible else "zstd" for name in _leaves(table.schema)}
    dictionary = [name for name in compression if name.split(".")[0] in ("label", "view", "grid", "original_size")]
    parquet.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression=compression,
        use_dictionary=dictionary,
        write_page_checksum=True,
        write_statistics=["key", "label"],  # for packed bits they would be two more rows per group
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def entry_bytes(entry: Entry) -> bytes:
    """Content of an entry's file, which is its line in the manifest too."""
    return (entry.model_dump_json() + "\n").encode()


def sums_bytes(data: bytes) -> bytes:
    """Content of the file with a file's size and checksums."""
    sums = Sums(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), crc32=zlib.crc32(data))
    return (sums.model_dump_json() + "\n").encode()


def errors_bytes(entries: Sequence[Entry]) -> bytes:
    """Content of ``errors.parquet``: all skipped images."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    rows = [{"shard": entry.shard, "key": one.key, "reason": one.reason} for entry in entries for one in entry.errors]
    schema = arrow.schema([(name, arrow.string()) for name in ("shard", "key", "reason")])
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows, schema), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _leaves(schema: Any) -> list[str]:
    """Names of the Parquet columns that hold values."""
    parquet = require("pyarrow.parquet", extra="tables")
    arrow = require("pyarrow", extra="tables")
    sink = arrow.BufferOutputStream()
    parquet.write_table(schema.empty_table(), sink)
    columns = parquet.ParquetFile(arrow.BufferReader(sink.getvalue())).schema
    return [columns.column(number).path for number in range(len(columns.names))]


def _entry(data: bytes, where: str) -> Entry:
    return validate_json(Entry, data, where, remedy="delete this file, and `qlip tokenize` makes the part again")
