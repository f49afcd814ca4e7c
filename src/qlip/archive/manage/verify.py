"""Check a token dataset: its parts against their SHA-256 and row counts, and its records against the parts.

`verify` reads every part once and returns a `VerifyReport` with a `Finding` for each fault:

- a part that is damaged, missing or another dataset's: its shard has to be tokenised again;
- a manifest entry (stored twice), `dataset.json`, `errors.parquet` or `source.json` that does not match: `repair`
  rebuilds the first three where the intact parts and entries determine them.

The card and the search index are not checked.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from qlip.archive.dataset.completeness import missing_parts
from qlip.archive.dataset.entropy_coding import open_coder
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
from qlip.archive.dataset.parquet_reader import damaged, keys_of, open_bytes
from qlip.archive.dataset.schema import MUST_AGREE, DatasetInfo, arrow_schema, info_of
from qlip.archive.manage.merge import merge_infos
from qlip.data.storage.retry import MissingError
from qlip.errors import QLIPError, require
from qlip.runtime.progress import OnProgress, no_progress
from qlip.tokens.entropy.tables import FILE

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


def verify(
    layout: Layout, *, repair: bool = False, allow_partial: bool = False, on_progress: OnProgress = no_progress
) -> VerifyReport:
    """Check a dataset.

    Args:
        layout: of the dataset.
        repair: rebuild manifest, `dataset.json` and `errors.parquet` where the intact parts and entries determine them.
        allow_partial: parts that were never made, or an unfinished run, are a note and not a fault.
        on_progress: called after each part.

    Raises:
        QLIPError: no dataset there, or it cannot be read or written.
    """
    if not layout.exists():
        layout.read_info()  # raises
    report, manifest = VerifyReport(), _Manifest(layout)
    infos, entries, uncertain = dict[str, DatasetInfo](), dict[int, Entry](), set[int]()
    for part, copies in manifest.copies.items():
        name = f"data/{part_name(part)}.parquet"
        if not copies:
            report.add(f"manifest/{part_name(part)}.json", f"cannot be read; {_again(name)}")
            uncertain.add(part)
            continue
        file, fitting = _open_intact(layout, copies, name, report)
        if len(fitting) != 1 or (file is None and not manifest.agrees(part)):
            uncertain.add(part)
        entry = entries[part] = fitting[0]
        report.count(entry)
        if file is not None:
            _check_part(file, entry, name, infos, report)
        on_progress(1)
    all_known = not uncertain and not manifest.unknown_parts
    ended = manifest.lines is not None
    rebuilt = _check_manifest(manifest, entries, uncertain, all_known, report)
    rebuilt |= _check_info(layout, infos, entries, all_known and ended, report)
    if all_known and ended:
        rebuilt |= _check_errors(layout, list(entries.values()), report)
    else:
        why = "the run has not ended" if all_known else "not all manifest entries are known"
        report.notes.append(f"{ERRORS}: not checked, for {why}")
    _check_source(layout, report)
    _check_whole(layout, manifest, list(entries.values()), allow_partial, report)
    if repair:
        for name, data in rebuilt.items():
            layout.storage.write(layout.path(name), data)
        report.findings = [replace(one, repaired=one.repairable) for one in report.findings]
    return report


# -------------------------------------------------------------------- parts


def _again(name: str, shard: str | None = None) -> str:
    which = "its shard" if shard is None else f"shard {shard!r}"
    return f"delete {name} and tokenise {which} again, or copy the dataset again"


def _open_intact(
    layout: Layout, copies: list[Entry], name: str, report: VerifyReport
) -> tuple[Any | None, list[Entry]]:
    """Read a part and compare it with its entry.

    Returns:
        The opened part, None if it is damaged; and the copies of the entry that fit it, all of them if none does.
    """
    first = copies[0]
    try:
        data = layout.storage.read(layout.part_path(first.part))
    except MissingError:
        again = f"tokenise shard {first.shard!r} again, or copy the dataset again"
        report.add(name, f"missing, but listed in the manifest; {again}")
        return None, copies
    described = [entry for entry in copies if entry.describes(data)]
    if not described:
        what = "its SHA-256 is not the manifest's"
        if len(data) != first.bytes:
            what = f"{len(data):,} bytes, and the manifest says {first.bytes:,}"
        report.add(name, f"damaged ({what}); {_again(name, first.shard)}")
        return None, copies
    arrow = require("pyarrow", extra="tables")
    try:
        file = open_bytes(data)
        sizes = (len(data), zlib.crc32(data), file.metadata.num_rows)
        fitting = [entry for entry in described if (entry.bytes, entry.crc32, entry.rows) == sizes]
        if len(fitting) > 1:
            keys = len(keys_of(file))
            fitting = [entry for entry in fitting if keys + len(entry.errors) == entry.inputs]
    except (OSError, arrow.ArrowException) as error:
        report.add(name, str(damaged(name, error)))
        return None, described
    return file, fitting or described


def _check_part(file: Any, entry: Entry, name: str, infos: dict[str, DatasetInfo], report: VerifyReport) -> None:
    """Check the schema of an intact part, and its numbers of rows and images."""
    try:
        info = info_of(file.schema_arrow.metadata, name)
    except QLIPError as error:
        report.add(name, str(error))
        return
    infos[name] = info
    if not file.schema_arrow.equals(arrow_schema(info)):
        what = f"columns {', '.join(file.schema_arrow.names)}, of other names or types than its info asks for"
        report.add(name, what)
        return
    if file.metadata.num_rows != entry.rows:
        report.add(name, f"{file.metadata.num_rows:,} rows, and the manifest says {entry.rows:,}")
    keys, skipped = keys_of(file), {one.key for one in entry.errors}
    if len(keys) + len(entry.errors) != entry.inputs or keys & skipped:
        what = f"{len(keys):,} keys and {len(entry.errors):,} errors, and the shard had {entry.inputs:,} images"
        report.add(name, what)


# -------------------------------------------------------------------- records


class _Manifest:
    """Entries of a dataset, each of which is stored twice: in a file of its own and as a line of `manifest.jsonl`.

    Attributes:
        files: content of the entry files by part.
        lines: content of `manifest.jsonl`; None if no run has ended.
        copies: different entries of each part that can be read, in the order of parts.
        unknown_parts: a line cannot be read that may be of a part without an entry file.
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
        self.copies: dict[int, list[Entry]] = {
            part: [] for part in sorted(self.files.keys() | {one.part for one in listed})
        }
        for entry in [*(_parsed(data, part) for part, data in self.files.items()), *listed]:
            if entry is not None and entry not in self.copies[entry.part]:
                self.copies[entry.part].append(entry)

    def agrees(self, part: int) -> bool:
        """Return whether both copies of a part's entry are the same, or the only one is right for a run under way."""
        entry = self.copies[part][0]
        return self.files.get(part) == entry_bytes(entry) and entry_bytes(entry) in (self.lines or entry_bytes(entry))


def _parsed(data: bytes, part: int | None = None) -> Entry | None:
    try:
        entry = Entry.model_validate_json(data)
    except ValueError:
        return None
    return entry if part in (None, entry.part) else None


def _check_manifest(
    manifest: _Manifest, entries: dict[int, Entry], uncertain: set[int], all_known: bool, report: VerifyReport
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
    try:
        stored = DatasetInfo.from_json(layout.storage.read(layout.path(INFO)), INFO)
    except QLIPError:
        stored = None
    if not infos:
        if stored is None:
            report.add(INFO, "cannot be read; copy the dataset again")
        return {}
    try:
        right = merge_infos(infos.items())
        if right.coding == "entropy":
            open_coder(layout, right)
    except QLIPError as error:
        where = FILE if FILE in str(error) else next(iter(infos))
        report.add(where, str(error).removeprefix(layout.path(FILE)).lstrip(": "))
        return {}
    complete = complete and len(infos) == len(entries)
    compared = DatasetInfo.model_fields if complete else MUST_AGREE  # other parts may have other grids and captions
    names = [] if stored is None else [name for name in compared if getattr(stored, name) != getattr(right, name)]
    if stored is not None and not names:
        return {}
    what = "cannot be read" if stored is None else f"{', '.join(names)} differ from the parts"
    report.add(INFO, what if complete else f"{what}; copy the dataset again", repairable=complete)
    return {INFO: (right.to_json() + "\n").encode()} if complete else {}


def _check_errors(layout: Layout, entries: list[Entry], report: VerifyReport) -> dict[str, bytes]:
    """Compare the table of skipped images with the entries."""
    path, right = layout.path(ERRORS), errors_bytes(entries)
    if not layout.storage.exists(path):
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
        one, other = open_bytes(raw), open_bytes(right)
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


def _check_whole(
    layout: Layout, manifest: _Manifest, entries: list[Entry], allow_partial: bool, report: VerifyReport
) -> None:
    """Look for parts that were never made, and for files of parts without an entry."""
    known = {f"{part_name(part)}.parquet" for part in manifest.copies}
    found = (path.rpartition("/")[2] for path in layout.storage.glob(layout.path("data/*.parquet")))
    unlisted = [name for name in found if name not in known]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        report.notes.append(
            f"data/{unlisted[0]}{more}: not in the manifest; the run that wrote it makes it again when resumed"
        )
    if missing := missing_parts(layout, entries, check_files=False):
        if allow_partial:
            report.notes.append(f"incomplete: {missing}")
        else:
            report.add("data" if missing.parts else MANIFEST, f"incomplete: {missing}")
