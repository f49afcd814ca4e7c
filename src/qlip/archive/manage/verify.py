"""Check a token dataset: parts against their SHA-256, records against the parts, and the rows themselves.

`verify` reads every part once and returns a `VerifyReport` with a `Finding` for each fault:

- a part whose bytes are not those that were written, or that is missing: its shard has to be tokenised again;
- a manifest entry (stored twice), `dataset.json`, `errors.parquet` or `source.json` that does not match: `repair`
  rebuilds the first three from the intact parts and entries;
- rows that a writer got wrong: schema, counts, repeated keys, lengths of tokens and of embeddings.

The card and the search index are not checked.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.dataset import fixed_size
from qlip.archive.dataset.entropy_coding import RowCoder, open_coder
from qlip.archive.dataset.layout import (
    ERRORS,
    INFO,
    MANIFEST,
    SOURCE,
    SUMS,
    Entry,
    Layout,
    entry_bytes,
    errors_bytes,
    part_name,
    sums_bytes,
)
from qlip.archive.dataset.parquet_reader import damaged, open_bytes
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema, info_of
from qlip.archive.manage.merge import MUST_AGREE, merge_infos
from qlip.data.storage.retry import MissingError
from qlip.errors import QLIPError, require
from qlip.runtime.progress import OnProgress, no_progress
from qlip.tokens.entropy.tables import FILE

MAX_REPEATED_KEYS = 1000
"""Repeated keys that are compared by their tokens."""
UNIT_TOLERANCE = 0.01
"""Largest deviation of a float16 unit vector's length from 1."""
ENTRY_NAME = re.compile(r"part-(\d+)\.json$")


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset.

    Attributes:
        file: inside the dataset.
        what: the fault and the remedy in one line.
        repairable: `verify` can repair it.
        repaired: `verify` has repaired it.
    """

    file: str
    what: str
    repairable: bool = False
    repaired: bool = False


@dataclass
class VerifyReport:
    """Result of checking a dataset.

    Attributes:
        parts, rows, images, skipped, bytes: sums over the manifest; skipped images are in no row.
        findings: faults.
        notes: other facts, which are no faults.
    """

    parts: int = 0
    rows: int = 0
    images: int = 0
    skipped: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """True if there is no fault, or all were repaired."""
        return all(finding.repaired for finding in self.findings)

    def add(self, file: str, what: str, *, repairable: bool = False) -> None:
        """Add a fault."""
        self.findings.append(Finding(file, what, repairable))

    def count(self, entry: Entry) -> None:
        """Add a part to the sums."""
        self.parts += 1
        self.rows += entry.rows
        self.images += entry.inputs
        self.skipped += len(entry.errors)
        self.bytes += entry.bytes


def verify(layout: Layout, *, repair: bool = False, on_progress: OnProgress = no_progress) -> VerifyReport:
    """Check a dataset.

    Args:
        layout: of the dataset.
        repair: rebuild manifest, `dataset.json` and `errors.parquet` where the intact parts and entries determine them.
        on_progress: called after each part.

    Raises:
        QLIPError: no dataset there, or it cannot be read or written.
    """
    if not layout.exists():
        layout.read_info()  # raises
    report, manifest = VerifyReport(), _Manifest(layout)
    infos, seen, coder = dict[str, DatasetInfo](), _Keys(), _coder(layout, report)
    entries, uncertain = dict[int, Entry](), set[int]()
    for part, candidates in manifest.candidates.items():
        name = f"data/{part_name(part)}.parquet"
        if not candidates:
            report.add(f"manifest/{part_name(part)}.json", f"cannot be read; {_again(name)}")
            uncertain.add(part)
            continue
        table, fitting = _intact_table(layout, candidates, name, report)
        if len(fitting) != 1 or (table is None and not manifest.agrees(part)):
            uncertain.add(part)
        entry = entries[part] = fitting[0]
        report.count(entry)
        if table is not None:
            _check_table(table, entry, name, coder, infos, report)
            seen.add(part, table)
        on_progress(1)
    all_known = not uncertain and not manifest.unknown_parts
    rebuilt = _check_manifest(manifest, entries, uncertain, all_known, report)
    rebuilt |= _check_info(layout, infos, entries, all_known and manifest.lines is not None, report)
    if not all_known:
        report.notes.append(f"{ERRORS}: not checked, for not all manifest entries are known")
    else:
        rebuilt |= _check_errors(layout, list(entries.values()), manifest.lines is not None, report)
    _check_source(layout, report)
    _check_repeated(layout, seen, report)
    _check_unlisted(layout, manifest.candidates.keys(), report)
    if not entries:
        report.notes.append("no part is finished")
    if repair:
        for name, data in rebuilt.items():
            layout.storage.write(layout.path(name), data)
        report.findings = [replace(one, repaired=one.repairable) for one in report.findings]
    return report


# -------------------------------------------------------------------- parts


def _again(name: str, shard: str | None = None) -> str:
    which = "its shard" if shard is None else f"shard {shard!r}"
    return f"delete {name} and tokenise {which} again, or copy the dataset again"


def _intact_table(
    layout: Layout, candidates: list[Entry], name: str, report: VerifyReport
) -> tuple[Any | None, list[Entry]]:
    """Read a part and compare it with its entry.

    Returns:
        Its rows, None if it is damaged; and the candidates that fit it, all of them if none does.
    """
    first = candidates[0]
    try:
        data = layout.storage.read(layout.part_path(first.part))
    except MissingError:
        report.add(name, f"missing, but listed in the manifest; {_again(name, first.shard)}")
        return None, candidates
    described = [entry for entry in candidates if entry.describes(data)]
    if not described:
        difference = len(data) - first.bytes
        what = "its SHA-256 is not the manifest's"
        if difference:
            what = f"{len(data):,} bytes, and the manifest says {first.bytes:,}"
        report.add(name, f"damaged ({what}); {_again(name, first.shard)}")
        return None, candidates
    arrow = require("pyarrow", extra="tables")
    try:
        table = open_bytes(data, check=True).read()
    except (OSError, arrow.ArrowException) as error:
        report.add(name, str(damaged(name, error)))
        return None, described
    sizes = (len(data), zlib.crc32(data), table.num_rows)
    fitting = [entry for entry in described if (entry.bytes, entry.crc32, entry.rows) == sizes]
    if len(fitting) > 1:
        keys = len(set(table.column("key").to_pylist()))
        fitting = [entry for entry in fitting if keys + len(entry.errors) == entry.inputs]
    return table, fitting or described


def _check_table(
    table: Any, entry: Entry, name: str, coder: RowCoder | None, infos: dict[str, DatasetInfo], report: VerifyReport
) -> None:
    try:
        info = infos[name] = info_of(table.schema.metadata, name)
        for what in _row_faults(table, info, entry, coder):
            report.add(name, what)
    except QLIPError as error:
        report.add(name, str(error))


def _coder(layout: Layout, report: VerifyReport) -> RowCoder | None:
    """Open the entropy coder of coded rows."""
    try:
        info = layout.read_info()
    except QLIPError:
        return None  # reported by _check_info
    if info.coding == "raw":
        return None
    try:
        return open_coder(layout, info)
    except QLIPError as error:
        report.add(FILE, str(error).removeprefix(layout.path(FILE)).lstrip(": "))
        return None


# -------------------------------------------------------------------- records


class _Manifest:
    """Entries of a dataset, each of which is stored twice: in a file of its own and as a line of `manifest.jsonl`.

    Attributes:
        files: content of the entry files by part.
        lines: content of `manifest.jsonl`; None if no run has ended.
        candidates: different entries of each part that can be read, in the order of parts.
        unknown_parts: whether a line cannot be read that may be of a part without an entry file.
    """

    def __init__(self, layout: Layout) -> None:
        storage = layout.storage
        paths = sorted(path for path in storage.glob(layout.path("manifest/part-*.json")) if ENTRY_NAME.search(path))
        contents = storage.map(storage.read, paths)
        self.files = {
            int(ENTRY_NAME.search(path)[1]): data  # type: ignore[index]
            for path, data in zip(paths, contents, strict=True)
        }
        path = layout.path(MANIFEST)
        self.lines = storage.read(path) if storage.exists(path) else None
        lines = [line for line in (self.lines or b"").split(b"\n") if line.strip()]
        parts: list[int | None] = sorted(self.files) if len(lines) == len(self.files) else [None] * len(lines)  # type: ignore[assignment]
        listed = [entry for line, part in zip(lines, parts, strict=True) if (entry := _parsed(line, part)) is not None]
        self.unknown_parts = len(lines) - len(listed) > len(self.files.keys() - {entry.part for entry in listed})
        found: dict[int, list[Entry]] = {part: [] for part in sorted(self.files.keys() | {one.part for one in listed})}
        for entry in [*(_parsed(data, part) for part, data in self.files.items()), *listed]:
            if entry is not None and entry not in found[entry.part]:
                found[entry.part].append(entry)
        self.candidates = found

    def agrees(self, part: int) -> bool:
        """Return whether both copies of a part's entry are the same, or the only one is right for a run under way."""
        entry = self.candidates[part][0]
        return self.files.get(part) == entry_bytes(entry) and entry_bytes(entry) in (self.lines or entry_bytes(entry))


def _parsed(data: bytes, part: int | None = None) -> Entry | None:
    try:
        entry = Entry.model_validate_json(data)
    except ValueError:
        return None
    return entry if part in (None, entry.part) else None


def _check_manifest(
    manifest: _Manifest, entries: dict[int, Entry], uncertain: Set[int], all_known: bool, report: VerifyReport
) -> dict[str, bytes]:
    """Compare both copies of the entries with those that fit the parts; returns the files to rebuild."""
    rebuilt = dict[str, bytes]()
    for part, entry in entries.items():
        name, data = f"manifest/{part_name(part)}.json", manifest.files.get(part)
        if data == entry_bytes(entry):
            continue
        if part not in uncertain:
            rebuilt[name] = entry_bytes(entry)
        what = f"missing, but part {part} is in {MANIFEST}" if data is None else "does not describe its part"
        report.add(name, what, repairable=name in rebuilt)
    if manifest.lines is None:
        report.notes.append(f"no {MANIFEST}: the run has not ended; its finished parts were checked")
        return rebuilt
    wanted = [entry_bytes(entry) for entry in entries.values()]
    if manifest.lines != b"".join(wanted):
        lines = manifest.lines.splitlines(keepends=True)
        first = next((place for place, (one, two) in enumerate(zip(lines, wanted, strict=False)) if one != two), None)
        place = min(len(lines), len(wanted)) if first is None else first
        other = [f"manifest/{part_name(part)}.json" for part in entries][place : place + 1] or ["any entry"]
        if all_known:
            rebuilt[MANIFEST] = b"".join(wanted)
        report.add(MANIFEST, f"line {place + 1:,} differs from {other[0]}", repairable=all_known)
    return rebuilt


def _check_info(
    layout: Layout, infos: dict[str, DatasetInfo], entries: dict[int, Entry], complete: bool, report: VerifyReport
) -> dict[str, bytes]:
    """Compare `dataset.json` with the parts, each of which has its own; it is rebuilt from all of them only.

    Args:
        infos: by part's name.
        complete: the run has ended, and all entries are known.
    """
    raw = layout.storage.read(layout.path(INFO))
    try:
        stored = DatasetInfo.from_json(raw, INFO)
    except QLIPError:
        stored = None
    if not infos:
        if stored is None:
            report.add(INFO, "cannot be read; copy the dataset again")
        return {}
    try:
        right = merge_infos(infos.items())
    except QLIPError as error:
        report.add(next(iter(infos)), f"the parts do not go together: {error}")
        return {}
    complete = complete and len(infos) == len(entries)
    compared = DatasetInfo.model_fields if complete else MUST_AGREE  # other parts may have other grids and captions
    names = [] if stored is None else [name for name in compared if getattr(stored, name) != getattr(right, name)]
    if stored is not None and not names:
        return {}
    what = "cannot be read" if stored is None else f"{', '.join(names)} differ from the parts"
    report.add(INFO, what if complete else f"{what}; copy the dataset again", repairable=complete)
    return {INFO: (right.to_json() + "\n").encode()} if complete else {}


def _check_errors(layout: Layout, entries: list[Entry], ended: bool, report: VerifyReport) -> dict[str, bytes]:
    """Compare the table of skipped images with the entries."""
    path, right = layout.path(ERRORS), errors_bytes(entries)
    if not layout.storage.exists(path):
        if not ended:
            return {}
        report.add(ERRORS, "missing", repairable=True)
        return {ERRORS: right}
    raw = layout.storage.read(path)
    if raw == right or _same_rows(raw, right):
        return {}
    report.add(ERRORS, "not the skipped images of the manifest", repairable=True)
    return {ERRORS: right}


def _same_rows(raw: bytes, right: bytes) -> bool:
    """Return whether another version of pyarrow wrote the same rows."""
    arrow = require("pyarrow", extra="tables")
    try:
        one, other = (open_bytes(data, check=False) for data in (raw, right))
        writers = [str(file.metadata.created_by).rpartition(" ") for file in (one, other)]
        return writers[0][0] == writers[1][0] and writers[0] != writers[1] and bool(one.read().equals(other.read()))
    except (OSError, ValueError, arrow.ArrowException):  # UnicodeDecodeError, too
        return False


def _check_source(layout: Layout, report: VerifyReport) -> None:
    """Compare `source.json` with its checksums, which datasets of early versions do not have."""
    source, sums = layout.path(SOURCE), layout.path(SUMS)
    if not layout.storage.exists(sums):
        return
    if not layout.storage.exists(source):
        report.add(SOURCE, f"missing, but {SUMS} has its checksums; copy the dataset again")
    elif layout.storage.read(sums) != sums_bytes(layout.storage.read(source)):
        report.add(SOURCE, f"does not match its checksums in {SUMS}; copy both again")


# -------------------------------------------------------------------- rows


def _row_faults(table: Any, info: DatasetInfo, entry: Entry, coder: RowCoder | None) -> list[str]:
    """Faults of rows that are as they were written: faults of their writer."""
    faults = []
    if not table.schema.equals(arrow_schema(info)):
        return [f"columns {', '.join(table.schema.names)}, of other names or types than its info asks for"]
    if table.num_rows != entry.rows:
        faults.append(f"{table.num_rows:,} rows, and the manifest says {entry.rows:,}")
    keys = table.column("key").to_pylist()
    distinct = set(keys)
    if len(distinct) + len(entry.errors) != entry.inputs or distinct & {one.key for one in entry.errors}:
        faults.append(
            f"{len(distinct):,} keys and {len(entry.errors):,} errors, and the shard had {entry.inputs:,} images"
        )
    views = table.column("view").to_pylist()
    pairs: dict[tuple[str, int], int] = {}
    for row, pair in enumerate(zip(keys, views, strict=True)):
        if pair in pairs:
            faults.append(f"row {row:,} has the key and view of row {pairs[pair]:,}: {pair[0]!r}, view {pair[1]}")
            break
        pairs[pair] = row
    if info.views.count is None:
        sizes = table.column("original_size").to_pylist()
        counts = [info.views.count_of((width, height)) for width, height in sizes]
    else:
        counts = [info.views.count] * len(views)
    wrong = next((row for row, (view, count) in enumerate(zip(views, counts, strict=True)) if view >= count), None)
    if wrong is not None:
        faults.append(f"row {wrong:,} (key {keys[wrong]!r}): view {views[wrong]}, and an image has {counts[wrong]:,}")
    if table.num_rows:
        faults += _token_faults(table.combine_chunks(), info, keys, coder)
    return faults


def _token_faults(table: Any, info: DatasetInfo, keys: list[str], coder: RowCoder | None) -> list[str]:
    """Faults of grids, of the tokens' lengths and padding, and of embeddings."""
    faults = []
    grids = np.asarray(table.column("grid").chunk(0).flatten()).reshape(-1, 2).astype(np.int64)
    if info.grid is not None and (grids != info.grid).any():
        row = int(np.flatnonzero((grids != info.grid).any(axis=1))[0])
        faults.append(f"row {row:,} (key {keys[row]!r}) is of another grid than the dataset")
    bits = grids.prod(axis=1) * info.bits_per_token
    tokens = table.column("tokens").chunk(0)
    if info.token_bytes is not None:
        lengths, last = np.full(len(grids), info.token_bytes), fixed_size(tokens)[:, -1]
    else:
        rows: list[bytes] = tokens.to_pylist()
        if info.coding == "entropy":
            if coder is None:
                return faults
            try:
                rows = coder.decode(rows, [(height, width) for height, width in grids.tolist()])
            except QLIPError as error:
                return [*faults, f"a row's tokens cannot be decoded: {error}"]
        lengths = np.array([len(one) for one in rows])
        last = np.array([one[-1] if one else 0 for one in rows], dtype=np.uint8)
    padding = (-bits) % 8
    wrong = (lengths != -(-bits // 8)) | (last & ((1 << padding) - 1) != 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        faults.append(f"row {row:,} (key {keys[row]!r}): its tokens are not the packed bits of its grid")
    if info.embedding_dim is not None:
        column = table.column("embedding").chunk(0)
        if column.null_count:
            return [*faults, f"{column.null_count:,} rows have no embedding"]
        vectors = np.asarray(column.flatten()).reshape(-1, info.embedding_dim).astype(np.float32)
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_TOLERANCE))
        if len(bad):
            faults.append(f"row {bad[0]:,} (key {keys[bad[0]]!r}): its embedding is no unit vector")
    return faults


class _Part(NamedTuple):
    part: int
    pairs: NDArray[np.int64]
    """Hashes of (key, view), unique."""
    keys: NDArray[np.int64]
    """Hashes of the keys of `pairs`."""


class _Keys:
    """Keys and views of each part, as hashes: 16 bytes per row."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def add(self, part: int, table: Any) -> None:
        keys, views = (table.column(name).to_pylist() for name in ("key", "view"))
        pairs = np.fromiter((hash(pair) for pair in zip(keys, views, strict=True)), np.int64)
        distinct, places = np.unique(pairs, return_index=True)
        self.parts.append(_Part(part, distinct, np.fromiter((hash(key) for key in keys), np.int64)[places]))

    def repeated(self) -> tuple[NDArray[np.int64], int]:
        """Return hashes of (key, view) that occur in more than one part, and the number of their keys."""
        if not self.parts:
            return np.empty(0, np.int64), 0
        pairs = np.concatenate([one.pairs for one in self.parts])
        values, counts = np.unique(pairs, return_counts=True)
        twice = values[counts > 1]
        keys = np.concatenate([one.keys for one in self.parts])
        return twice, len(np.unique(keys[np.isin(pairs, twice)]))


def _check_repeated(layout: Layout, seen: _Keys, report: VerifyReport) -> None:
    """A key in two parts is a repeated row if the tokens agree; else two shards have images of one name."""
    repeated, num_keys = seen.repeated()
    if not len(repeated):
        return
    wanted = repeated[:MAX_REPEATED_KEYS]
    first, example = dict[tuple[str, int], tuple[int, bytes]](), ""
    for one in seen.parts:
        if not np.isin(wanted, one.pairs).any():
            continue
        data, chosen = layout.storage.read(layout.part_path(one.part)), set(wanted.tolist())
        for row in open_bytes(data, check=False).read(columns=["key", "view", "tokens"]).to_pylist():
            pair = (row["key"], row["view"])
            if hash(pair) not in chosen:
                continue
            other, tokens = first.setdefault(pair, (one.part, row["tokens"]))
            if other != one.part and tokens == row["tokens"]:
                name = f"data/{part_name(one.part)}.parquet"
                report.add(
                    name, f"key {pair[0]!r}, view {pair[1]} occurs twice, in data/{part_name(other)}.parquet and {name}"
                )
                return
            if other != one.part and not example:
                example = f"{pair[0]!r} in parts {other} and {one.part}"
    verb = "key names" if num_keys == 1 else "keys name"
    report.notes.append(f"{num_keys:,} {verb} images in more than one part, such as {example}")


def _check_unlisted(layout: Layout, parts: Set[int], report: VerifyReport) -> None:
    """Note parts without an entry: a run was stopped between writing the two."""
    known = {f"{part_name(part)}.parquet" for part in parts}
    found = (path.rpartition("/")[2] for path in layout.storage.glob(layout.path("data/*.parquet")))
    unlisted = [name for name in found if name not in known]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        report.notes.append(
            f"data/{unlisted[0]}{more}: not in the manifest; the run that wrote it makes it again when resumed"
        )
