"""Checking what a dataset says of itself: its manifest against the entries, its info against the parts, its errors."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from qlip.archive.dataset.layout import (
    ERRORS,
    INFO,
    MANIFEST,
    SOURCE,
    SUMS,
    Entry,
    Layout,
    SkippedImage,
    Sums,
    entry_bytes,
    errors_bytes,
    part_name,
    sums_bytes,
)
from qlip.archive.dataset.parquet_reader import open_bytes
from qlip.archive.dataset.provenance import SourceRecord
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.manage import flips
from qlip.archive.manage.damage import find_damage
from qlip.archive.manage.findings import Verified, one_bit, where_differs
from qlip.archive.manage.merge import MUST_AGREE, merged_info
from qlip.errors import QLIPError, require

NAME = re.compile(r"part-(\d+)\.json$")
MOST_DOUBTS = 4
"""Parts in doubt that the table of broken images is asked about: each doubles what it may hold."""


class Checked(NamedTuple):
    """The manifest, checked.

    Attributes:
        entries: to hold parts against, in order.
        doubtful: parts of which no entry is known to be right.
        ended: whether the run has ended, so that all parts are known.
    """

    entries: list[Entry]
    doubtful: frozenset[int]
    ended: bool


def check_entries(layout: Layout, report: Verified, mend: bool) -> Checked:
    """The entries, each of which stands twice: in a file of its own and as a line of the manifest.

    Where the two differ, the one that fits its part is right, or else the one that the table of broken images or
    `source.json` knows. Where that does not tell, both are named and left as they are.
    """
    storage = layout.storage
    paths = [path for path in storage.glob(layout.path("manifest/part-*.json")) if NAME.search(path)]
    contents = storage.map(storage.read, paths)
    files = {int(NAME.search(path)[1]): data for path, data in zip(paths, contents, strict=True)}  # type: ignore[index]
    files, path = dict(sorted(files.items())), layout.path(MANIFEST)
    manifest = storage.read(path) if storage.exists(path) else None
    if manifest is None:
        report.notes.append(f"no {MANIFEST}: its run has not ended; the parts that are finished were checked")
    lines = dict(files) if manifest is None else _lines(manifest, files)
    copies = {part: (files.get(part), lines.get(part)) for part in sorted(files.keys() | lines.keys())}
    likely = {part: _likely(layout, part, pair) for part, pair in copies.items()}
    _ask_errors(layout, likely)
    _ask_source(layout, likely)
    right = {part: entries[0] for part, entries in likely.items() if len(entries) == 1}
    for part, (file, line) in copies.items():
        if file != line or part not in right:
            start = sum(len(data) for other, data in lines.items() if other < part)
            name, what = _told(part, file, line, right.get(part), start)
            report.add(name, what, mendable=part in right, mended=mend and part in right)
    if manifest is not None and manifest != b"".join(lines[part] for part in sorted(lines)):
        report.add(MANIFEST, "holds lines that are no part's, or not in their order", mendable=True, mended=mend)
    if mend and report.findings:
        for part, entry in right.items():
            if files.get(part) != entry_bytes(entry):
                storage.write(layout.entry_path(part), entry_bytes(entry))
        wanted = b"".join(entry_bytes(right[part]) if part in right else lines.get(part, b"") for part in copies)
        if manifest not in (None, wanted):
            storage.write(path, wanted)
    found = [entries[0] for entries in likely.values() if entries]
    return Checked(found, frozenset(copies.keys() - right.keys()), manifest is not None)


def _lines(manifest: bytes, files: dict[int, bytes]) -> dict[int, bytes]:
    """The manifest's bytes of each part; cut at the places of the entries' files where the sizes fit.

    Else a line that cannot be read is of the next part that has a file and no line of its own.
    """
    if len(manifest) == sum(len(data) for data in files.values()):
        lines, start = {}, 0
        for part, data in files.items():
            lines[part] = manifest[start : start + len(data)]
            start += len(data)
        return lines
    read = [(line, _parsed(line, None)) for line in (one + b"\n" for one in manifest.split(b"\n") if one.strip())]
    known, found, last = {entry.part for _, entry in read if entry is not None}, dict[int, bytes](), -1
    for line, entry in read:
        last = entry.part if entry else min((one for one in files if one > last and one not in known), default=last + 1)
        found[last] = line
    return found


def _likely(layout: Layout, part: int, copies: tuple[bytes | None, bytes | None]) -> list[Entry]:
    """The entries that a part may have: none, one, or two that nothing has told apart so far."""
    file, line = (_parsed(copy, part) for copy in copies)
    if file is None or line is None or file == line:
        return [entry for entry in (file or line,) if entry is not None]
    return [entry for entry in (file, line) if _fits(layout, entry)] or [file, line]


def _ask_errors(layout: Layout, likely: dict[int, list[Entry]]) -> None:
    """Take the entries, where two are likely, with which the table of broken images is what it is."""
    doubts = [part for part, entries in likely.items() if len(entries) > 1]
    path = layout.path(ERRORS)
    if not 1 <= len(doubts) <= MOST_DOUBTS or not all(likely.values()) or not layout.storage.exists(path):
        return
    raw = layout.storage.read(path)
    choices = [choice for choice in product(*likely.values()) if errors_bytes(choice) == raw]
    for place, part in enumerate(likely):
        fits = [entry for entry in likely[part] if any(choice[place] == entry for choice in choices)]
        likely[part] = fits or likely[part]


def _ask_source(layout: Layout, likely: dict[int, list[Entry]]) -> None:
    """Take the entries, where two are likely, whose shard is named as in what was tokenised."""
    path = layout.path(SOURCE)
    if all(len(entries) < 2 for entries in likely.values()) or not layout.storage.exists(path):
        return
    try:
        shards = SourceRecord.from_json(layout.storage.read(path), path).shards
    except QLIPError:
        return  # of a merge, say
    for part, entries in likely.items():
        fits = [entry for entry in entries if part < len(shards) and entry.shard == shards[part].name]
        likely[part] = fits or entries


def _told(part: int, file: bytes | None, line: bytes | None, right: Entry | None, start: int) -> tuple[str, str]:
    """What is wrong with a part's entry, as (file, what); `start` is the line's place in the manifest."""
    name = f"manifest/{part_name(part)}.json"
    if file is None or line is None:
        return name if file is None else MANIFEST, f"part {part} is not in it"
    if right is None and _parsed(file, part) is None:
        return name, f"no entry can be read, here or in {MANIFEST}; copy the dataset again"
    if right is None:
        bit = one_bit(file, line)
        place = f" (byte {bit[0]:,} of it, {start + bit[0]:,} of {MANIFEST}, bit {bit[1]})" if bit else ""
        return name, f"says otherwise than {MANIFEST}{place}; which is right cannot be told, and both stay as they are"
    if file == entry_bytes(right):
        return MANIFEST, f"part {part}: {where_differs(line, file, start)}"
    return name, where_differs(file, line)


def _fits(layout: Layout, entry: Entry) -> bool:
    """Whether the part is what an entry says, or is but for one bit."""
    try:
        data = layout.storage.read(layout.part_path(entry.part))
    except QLIPError:
        return False
    damage = find_damage(data, entry)
    right = data if damage is None else damage.mended
    if right is None or (len(right), zlib.crc32(right)) != (entry.bytes, entry.crc32):
        return False
    keys = open_bytes(right, check=False).read(columns=["key"]).column("key")
    return len(keys) == entry.rows and len(keys.unique()) + len(entry.errors) == entry.inputs


def _parsed(data: bytes | None, part: int | None) -> Entry | None:
    try:
        entry = None if data is None else Entry.model_validate_json(data)
    except ValueError:
        return None
    if entry is None or data != entry_bytes(entry) or (part is not None and entry.part != part):
        return None
    return entry


def check_info(
    layout: Layout, found: Sequence[tuple[str, DatasetInfo]], checked: Checked, report: Verified, mend: bool
) -> None:
    """The dataset's info is what its parts say. It is made again only of all of them.

    Args:
        found: (name, info) of each part that can be read, in order; one at least.
        checked: the manifest.
    """
    try:
        right = merged_info(found)
    except QLIPError as error:
        report.add(found[0][0], f"the parts do not go together: {error}")
        return
    raw, wanted = layout.storage.read(layout.path(INFO)), (right.to_json() + "\n").encode()
    try:
        stored = DatasetInfo.from_json(raw, INFO)
    except QLIPError:
        stored = None
    if raw == wanted or stored == right:
        return  # the same, or written with other blanks
    all_there = checked.ended and not checked.doubtful and len(found) == len(checked.entries)
    if not all_there:
        _check_info_of_some(stored, found, right, checked, report)
        return
    names = [] if stored is None else _other_fields(stored, right, DatasetInfo.model_fields)
    of = f" ({', '.join(names)})" if names else ""
    if mend:
        layout.storage.write(layout.path(INFO), wanted)
    report.add(INFO, f"{where_differs(raw, wanted)}{of}; the parts say what it should hold", mendable=True, mended=mend)


def _check_info_of_some(
    stored: DatasetInfo | None,
    found: Sequence[tuple[str, DatasetInfo]],
    right: DatasetInfo,
    checked: Checked,
    report: Verified,
) -> None:
    """What some of the parts can say: the others may have other grids, or captions."""
    left = "not all parts are at hand, so it stays as it is; copy it again"
    if stored is None:
        report.add(INFO, f"cannot be read; {left}")
        return
    has_first = found[0][0] == f"data/{part_name(checked.entries[0].part)}.parquet"
    of_all = ("grid", "captions")
    compared = [name for name in DatasetInfo.model_fields if name not in of_all] if has_first else MUST_AGREE
    names = _other_fields(stored, right, compared)
    names += ["grid"] * (stored.grid not in (None, right.grid)) + ["captions"] * (right.captions > stored.captions)
    if names:
        report.add(INFO, f"{', '.join(names)} of other values than {found[0][0]} has; {left}")


def _other_fields(one: DatasetInfo, other: DatasetInfo, names: Iterable[str]) -> list[str]:
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def check_errors(layout: Layout, entries: Sequence[Entry], report: Verified, mend: bool) -> None:
    """The table of broken images is what the entries say."""
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


def check_source(layout: Layout, report: Verified, mend: bool) -> None:
    """What was tokenised is what was written down; datasets of before it had sums are not checked."""
    source, path = layout.path(SOURCE), layout.path(SUMS)
    if not layout.storage.exists(path):
        return
    if not layout.storage.exists(source):
        report.add(SOURCE, f"not there, and {SUMS} has its checksums; copy it again")
        return
    data, raw = layout.storage.read(source), layout.storage.read(path)
    if raw == sums_bytes(data):
        return
    if one_bit(raw, sums_bytes(data)):  # then the other 255 bits say that the source is right
        report.add(SUMS, where_differs(raw, sums_bytes(data)), mendable=True, mended=mend)
        if mend:
            layout.storage.write(path, sums_bytes(data))
        return
    try:
        crc32 = Sums.model_validate_json(raw).crc32
    except ValueError:
        report.add(SUMS, f"cannot be read, so {SOURCE} was not checked; copy both again")
        return
    for byte, bit in flips.candidates(data, crc32):
        right = flips.flipped(data, byte, bit)
        if sums_bytes(right) == raw:
            report.add(SOURCE, where_differs(data, right), mendable=True, mended=mend)
            if mend:
                layout.storage.write(source, right)
            return
    report.add(SOURCE, f"not what was written, by its checksums in {SUMS}; copy both again")


def _same_rows(raw: bytes, right: bytes) -> bool:
    """Whether another version of pyarrow wrote the same."""
    arrow = require("pyarrow", extra="tables")
    try:
        one, other = (open_bytes(data, check=False) for data in (raw, right))
        return bool(one.metadata.created_by != other.metadata.created_by and one.read().equals(other.read()))
    except (OSError, arrow.ArrowException):
        return False


def broken_keys(errors: Sequence[SkippedImage]) -> set[str]:
    """Names of images that are in no row."""
    return {one.key for one in errors}
