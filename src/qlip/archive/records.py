"""Checking what a dataset says of itself: its manifest against the entries, its info against the parts, its errors."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence

from qlip.archive.findings import Verified, one_bit, where_differs
from qlip.archive.layout import (
    ERRORS,
    INFO,
    MANIFEST,
    BrokenImage,
    Entry,
    Layout,
    entry_bytes,
    errors_bytes,
    part_name,
)
from qlip.archive.merging import merged_info
from qlip.archive.schema import DatasetInfo
from qlip.errors import QLIPError, require

NAME = re.compile(r"part-(\d+)\.json$")
Fits = Callable[[Entry], bool]


def check_entries(layout: Layout, report: Verified, mend: bool) -> list[Entry]:
    """The entries, each of which stands twice: in a file of its own and as a line of the manifest.

    Where the two differ, the one that fits its part is right; where both do, both are named.
    """
    storage = layout.storage
    paths = [path for path in storage.glob(layout.path("manifest/part-*.json")) if NAME.search(path)]
    contents = storage.each(storage.read, paths)
    files = {int(NAME.search(path)[1]): data for path, data in zip(paths, contents, strict=True)}  # type: ignore[index]
    files = dict(sorted(files.items()))
    path = layout.path(MANIFEST)
    if not storage.exists(path):
        report.notes.append(f"no {MANIFEST}: its run has not ended; the parts that are finished were checked")
        lines = dict(files)
    else:
        lines = _lines(storage.read(path), files)
    entries = {}
    for part in sorted(files.keys() | lines.keys()):
        file, line = files.get(part), lines.get(part)
        one, other = _parsed(file, part), _parsed(line, part)
        if one is not None and file == line:
            entries[part] = one
            continue
        chosen, told = _chosen(layout, part, (file, one), (line, other), sum(len(files[p]) for p in files if p < part))
        for name, what in told:
            report.add(name, what, mendable=chosen is not None, mended=mend and chosen is not None)
        if chosen is not None:
            entries[part] = chosen
    found = list(entries.values())
    if mend and len(report.findings):
        for entry in found:
            if files.get(entry.part) != entry_bytes(entry):
                storage.write(layout.entry_path(entry.part), entry_bytes(entry))
        if storage.exists(path):
            storage.write(path, b"".join(entry_bytes(entry) for entry in found))
    return found


def _lines(manifest: bytes, files: dict[int, bytes]) -> dict[int, bytes]:
    """The manifest's bytes of each part; cut at the places of the entries' files where the sizes fit."""
    if len(manifest) == sum(len(data) for data in files.values()):
        lines, start = {}, 0
        for part, data in files.items():
            lines[part] = manifest[start : start + len(data)]
            start += len(data)
        return lines
    found = {}
    for number, line in enumerate(part + b"\n" for part in manifest.split(b"\n") if part.strip()):
        entry = _parsed(line, None)
        found[entry.part if entry is not None else list(files)[min(number, len(files) - 1)] if files else number] = line
    return found


def _chosen(
    layout: Layout,
    part: int,
    of_file: tuple[bytes | None, Entry | None],
    of_line: tuple[bytes | None, Entry | None],
    start: int,
) -> tuple[Entry | None, list[tuple[str, str]]]:
    """The entry that is right, and what to say: (file, what)."""
    (file, one), (line, other) = of_file, of_line
    name = f"manifest/{part_name(part)}.json"
    if file is None or line is None:
        gone = name if file is None else MANIFEST
        return one or other, [(gone, f"part {part} is not in it")]
    if one is not None and other is not None:
        fits = [entry for entry in (one, other) if _fits(layout, entry)]
        if len(fits) != 1:
            bit = one_bit(file, line)
            place = f" (byte {bit[0]:,} of it, {start + bit[0]:,} of {MANIFEST}, bit {bit[1]})" if bit else ""
            return None if not fits else one, [
                (name, f"says otherwise than {MANIFEST}{place}; one of the two is damaged")
            ]
        one, other = (one, None) if fits[0] is one else (None, other)
    if one is not None:
        return one, [(MANIFEST, f"part {part}: {_shifted(line, file, start)}")]
    if other is not None:
        return other, [(name, where_differs(file, line))]
    return None, [(name, "no entry can be read, here or in manifest.jsonl; copy the dataset again")]


def _shifted(wrong: bytes, right: bytes, start: int) -> str:
    """As `where_differs`, in bytes of the whole manifest."""
    return where_differs(b" " * start + wrong, b" " * start + right)


def _fits(layout: Layout, entry: Entry) -> bool:
    try:
        data = layout.storage.read(layout.part_path(entry.part))
    except QLIPError:
        return False
    written = (len(data), hashlib.sha256(data).hexdigest(), zlib.crc32(data))
    if written != (entry.bytes, entry.sha256, entry.crc32):
        return False
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    keys = parquet.read_table(arrow.BufferReader(data), columns=["key"]).column("key")
    return len(keys) == entry.rows and len(keys.unique()) + len(entry.errors) == entry.inputs


def _parsed(data: bytes | None, part: int | None) -> Entry | None:
    try:
        entry = None if data is None else Entry.model_validate_json(data)
    except ValueError:
        return None
    if entry is None or data != entry_bytes(entry) or (part is not None and entry.part != part):
        return None
    return entry


def check_info(layout: Layout, found: Sequence[tuple[str, DatasetInfo]], report: Verified, mend: bool) -> None:
    """The dataset's info is what its parts say.

    Args:
        found: (name, info) of each part, in order.
    """
    raw = layout.storage.read(layout.path(INFO))
    try:
        right = merged_info(found)
    except QLIPError as error:
        report.add(found[0][0], f"the parts do not go together: {error}")
        return
    wanted = (right.to_json() + "\n").encode()
    if raw == wanted:
        return
    try:
        stored = DatasetInfo.from_json(raw, INFO)
    except QLIPError:
        stored = None
    if stored == right:
        return  # written with other blanks
    names = [
        name
        for name in type(right).model_fields
        if stored is not None and getattr(stored, name) != getattr(right, name)
    ]
    of = f" ({', '.join(names)})" if names else ""
    if mend:
        layout.storage.write(layout.path(INFO), wanted)
    report.add(INFO, f"{where_differs(raw, wanted)}{of}; the parts say what it should hold", mendable=True, mended=mend)


def check_errors(layout: Layout, entries: Sequence[Entry], report: Verified, mend: bool) -> None:
    """The table of broken pictures is what the entries say."""
    path = layout.path(ERRORS)
    if not layout.storage.exists(path):
        if layout.storage.exists(layout.path(MANIFEST)):
            report.add(ERRORS, "not there", mendable=True, mended=mend)
            if mend:
                layout.storage.write(path, errors_bytes(entries))
        return
    raw, right = layout.storage.read(path), errors_bytes(entries)
    if raw == right or _same_rows(raw, right):
        return
    if mend:
        layout.storage.write(path, right)
    report.add(ERRORS, f"{where_differs(raw, right)}; the manifest has what it should hold", mendable=True, mended=mend)


def _same_rows(raw: bytes, right: bytes) -> bool:
    """Whether another version of pyarrow wrote the same."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    try:
        one, other = (parquet.ParquetFile(arrow.BufferReader(data)) for data in (raw, right))
        return bool(one.metadata.created_by != other.metadata.created_by and one.read().equals(other.read()))
    except (OSError, arrow.ArrowException):
        return False


def broken_keys(errors: Sequence[BrokenImage]) -> set[str]:
    """Names of pictures that are in no row."""
    return {one.key for one in errors}
