"""The files of a token dataset: where each lies, and how one is added so that it is there whole or not at all.

::

    DATASET/
      dataset.json            DatasetInfo
      source.json             what was tokenised: input and shards, so that a run in this folder goes on with the same
      source.sums.json        its size and checksums; datasets of before this was written have none
      data/part-00007.parquet the rows of input shard 7
      manifest/part-00007.json written after it: a part without this entry does not exist
      manifest.jsonl          all entries in order, written at the end of a run; readers begin here
      errors.parquet          images that could not be read, with the reason; the same
      README.md               the dataset's card

A part is written, then its entry. Killed between the two, the part is made again, the same bytes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qlip.archive.dataset.schema import DatasetInfo, Fingerprint
from qlip.data.storage.storage import Storage, is_remote, join, local_path
from qlip.errors import QLIPError, require, validate_json
from qlip.runtime.workspace import Workspace
from qlip.tokens.entropy.tables import FILE

INFO, SOURCE, MANIFEST, ERRORS, CARD = "dataset.json", "source.json", "manifest.jsonl", "errors.parquet", "README.md"
SUMS = "source.sums.json"
ROW_GROUP = 1024
"""Rows that are read at a time, at most."""

Content = bytes
"""The type, where a field has its name."""


class Sums(BaseModel):
    """Size and checksums of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Fingerprint
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


class SkippedImage(BaseModel):
    """An image that is not in the dataset.

    Attributes:
        key: of the image inside its shard.
        reason: one line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    reason: str


class Entry(BaseModel):
    """One part in the manifest.

    Attributes:
        part: its number; input shards are counted in their order.
        shard: what the input calls the shard.
        inputs: images of the shard; distinct keys of the rows and errors add up to it.
        rows: of the part.
        bytes, sha256, crc32: of the part's file.
        errors: images left out, with the reason.
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

    def describes(self, data: Content) -> bool:
        """Whether these are the bytes that were written."""
        return hashlib.sha256(data).hexdigest() == self.sha256


class Totals(NamedTuple):
    """Sums over parts; `pictures` are their inputs, of which `broken` are in no row."""

    parts: int
    rows: int
    pictures: int
    broken: int
    bytes: int


class Layout:
    """The files of one dataset.

    Args:
        address: its folder: a path, or an address that fsspec knows.
        storage: reads and writes.
    """

    def __init__(self, address: str, storage: Storage | None = None) -> None:
        self.address = str(address) if is_remote(address) else str(local_path(address))
        self.storage = storage or Storage()

    def path(self, name: str) -> str:
        """Address of a file below the folder."""
        return join(self.address, name)

    def part_path(self, part: int) -> str:
        """Address of a part's rows."""
        return self.path(f"data/{part_name(part)}.parquet")

    def entry_path(self, part: int) -> str:
        """Address of a part's manifest entry."""
        return self.path(f"manifest/{part_name(part)}.json")

    def workspace(self, plan: Mapping[str, object], *, of: str, record: str) -> Workspace:
        """Return the folder as resumable work; see `Workspace`."""
        return Workspace(
            self.address, plan, of=of, record=record, files=self.storage if is_remote(self.address) else None
        )

    def exists(self) -> bool:
        """Whether a dataset was begun here."""
        return self.storage.exists(self.path(INFO))

    def refuse_foreign(self) -> None:
        """Refuse to begin a dataset in a folder that is not empty: its files must not take the place of others.

        Raises:
            QLIPError: there is something, other than what a run writes before its `DatasetInfo`.
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
        """Raises QLIPError: no dataset here, or one of a newer version."""
        if not self.exists():
            raise QLIPError(f"{self.address}: no token dataset; give a folder that `qlip tokenize` wrote")
        return DatasetInfo.from_json(self.storage.read(self.path(INFO)), self.path(INFO))

    def write_info(self, info: DatasetInfo) -> None:
        """Written before the first part, and after the source, which stays as it is from then on."""
        source = self.path(SOURCE)
        if self.storage.exists(source):
            self.storage.write(self.path(SUMS), sums_bytes(self.storage.read(source)))
        self.storage.write(self.path(INFO), (info.to_json() + "\n").encode())

    def write_part(
        self,
        info: DatasetInfo,
        part: int,
        shard: str,
        inputs: int,
        table: Any,
        errors: Sequence[SkippedImage] = (),
    ) -> Entry:
        """Add a part: its rows, then its entry.

        Args:
            info: the dataset's.
            part, shard, inputs: as in `Entry`.
            table: a pyarrow table of `qlip.archive.dataset.schema.arrow_schema(info)`.
            errors: images that are in no row.

        Raises:
            QLIPError: the store cannot be written, or is full; the dataset is as it was.
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
        self.storage.write(self.part_path(part), data)
        self.storage.write(self.entry_path(part), entry_bytes(entry))
        return entry

    def finished(self) -> dict[int, Entry]:
        """All entries of the manifest's folder, by the numbers of their parts."""
        pattern = self.path("manifest/part-*.json")
        entries = self.storage.map(lambda path: _entry(self.storage.read(path), path), self.storage.glob(pattern))
        return {entry.part: entry for entry in sorted(entries, key=lambda entry: entry.part)}

    def write_manifest(self, entries: Sequence[Entry]) -> None:
        """Put all entries, and all errors, in one file each."""
        self.storage.write(self.path(ERRORS), errors_bytes(entries))
        self.storage.write(self.path(MANIFEST), b"".join(entry_bytes(entry) for entry in entries))

    def tidy(self) -> None:
        """Remove what writers that were killed left behind."""
        if not is_remote(self.address):
            for folder in (local_path(self.address), *(local_path(self.path(name)) for name in ("data", "manifest"))):
                for path in folder.glob(".*.part"):
                    path.unlink(missing_ok=True)

    def manifest(self) -> list[Entry]:
        """All entries, for a reader.

        Raises:
            QLIPError: no run has ended here yet, or the file is no manifest.
        """
        path = self.path(MANIFEST)
        if not self.storage.exists(path):
            found = self.finished()
            if not found:
                raise QLIPError(f"{self.address}: no part is finished; run `qlip tokenize` again, it goes on")
            return list(found.values())
        return [_entry(line, path) for line in self.storage.read(path).splitlines() if line.strip()]


def part_name(part: int) -> str:
    """Of its files, without their endings."""
    return f"part-{part:05d}"


def totals(entries: Sequence[Entry]) -> Totals:
    """What parts hold together."""
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
    """A table as a Parquet file: equal tables are equal bytes. Packed bits do not shrink, so they are stored as is."""
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
        write_statistics=["key", "label"],  # of packed bits they would be two rows more a group
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def entry_bytes(entry: Entry) -> bytes:
    """An entry as its file, and as its line of the manifest."""
    return (entry.model_dump_json() + "\n").encode()


def sums_bytes(data: bytes) -> bytes:
    """The file of a file's sums."""
    sums = Sums(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), crc32=zlib.crc32(data))
    return (sums.model_dump_json() + "\n").encode()


def errors_bytes(entries: Sequence[Entry]) -> bytes:
    """All images that are in no row, as a Parquet file."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    rows = [{"shard": entry.shard, "key": one.key, "reason": one.reason} for entry in entries for one in entry.errors]
    schema = arrow.schema([(name, arrow.string()) for name in ("shard", "key", "reason")])
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows, schema), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _leaves(schema: Any) -> list[str]:
    """Parquet's names of the columns that hold values."""
    parquet = require("pyarrow.parquet", extra="tables")
    arrow = require("pyarrow", extra="tables")
    sink = arrow.BufferOutputStream()
    parquet.write_table(schema.empty_table(), sink)
    columns = parquet.ParquetFile(arrow.BufferReader(sink.getvalue())).schema
    return [columns.column(number).path for number in range(len(columns.names))]


def _entry(data: bytes, where: str) -> Entry:
    return validate_json(Entry, data, where, remedy="delete this file, and `qlip tokenize` makes the part again")
