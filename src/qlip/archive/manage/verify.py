"""`qlip tokens verify`: every byte of a dataset against what was written, and what is wrong, where.

- Each part has its size, SHA-256 and CRC-32 in the manifest. The hash says whether, the CRC which bit (see
  `qlip.archive.manage.flips`), the part's columns which row; of larger damage the pages' own checksums say which rows.
- Each entry of the manifest stands twice; `dataset.json` is what the parts say, `errors.parquet` what the entries say.
- `source.json` has its sums beside it, an entropy coder's tables theirs in `dataset.json`. The card is not checked.
- Rows: distinct keys and broken images are the inputs, no image's view twice, tokens as long as their grids ask.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.dataset import fixed_size
from qlip.archive.dataset.entropy_coding import RowCoder, open_coder
from qlip.archive.dataset.layout import ERRORS, Entry, Layout, part_name
from qlip.archive.dataset.parquet_reader import damaged, open_bytes
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema, info_of
from qlip.archive.manage.damage import find_damage
from qlip.archive.manage.findings import Verified
from qlip.archive.manage.records import broken_keys, check_entries, check_errors, check_info, check_source
from qlip.data.storage.retry import MissingError
from qlip.errors import QLIPError, require
from qlip.tokens.entropy.tables import FILE

INSPECTED = 1000
"""Repeated keys that are looked at, to tell doubled rows from images of one name."""

UNIT = 0.01
"""How far the length of a float16 unit vector may be from 1."""

Tick = Callable[[int], None]


def verify(layout: Layout, *, mend: bool = False, tick: Tick = lambda parts: None) -> Verified:
    """Check a dataset.

    Args:
        layout: of the dataset.
        mend: put right what can be: a single flipped bit, once the SHA-256 fits again; a copy whose other is known to
            be right; `dataset.json` and the errors, where all that they are made of is there. Stopped, it goes on.
        tick: told of each part that was checked.

    Raises:
        QLIPError: no dataset there, or it cannot be read or written.
    """
    if not layout.exists():
        layout.read_info()  # says so
    report = Verified()
    checked = check_entries(layout, report, mend)
    entries = checked.entries
    if not entries:
        report.notes.append("no part is finished")
    infos, seen, coder = [], _Keys(), _coder(layout, report)
    for entry in entries:
        _count(report, entry)
        table = _sound_table(layout, entry, report, mend)
        if table is not None:
            name = f"data/{part_name(entry.part)}.parquet"
            try:
                info = info_of(table.schema.metadata, name)
                infos.append((name, info))
                for what in _faults(table, info, entry, coder):
                    report.add(name, what)
            except QLIPError as error:
                report.add(name, str(error))
            seen.add(entry.part, table)
        tick(1)
    if infos:
        check_info(layout, infos, checked, report, mend)
    if checked.doubtful:
        report.notes.append(f"{ERRORS} was not checked: it should hold what the entries say, and not all are known")
    else:
        check_errors(layout, entries, report, mend)
    check_source(layout, report, mend)
    _check_repeated(layout, seen, report)
    _check_strangers(layout, {entry.part for entry in entries} | checked.doubtful, report)
    return report


def _coder(layout: Layout, report: Verified) -> RowCoder | None:
    """What decodes the rows, where they are coded."""
    try:
        info = layout.read_info()
    except QLIPError:
        return None  # its damage is among the findings
    if info.coding == "raw":
        return None
    try:
        return open_coder(layout, info)
    except QLIPError as error:
        report.add(FILE, str(error).removeprefix(layout.path(FILE)).lstrip(": "))
        return None


def _count(report: Verified, entry: Entry) -> None:
    report.parts += 1
    report.rows += entry.rows
    report.pictures += entry.inputs
    report.broken += len(entry.errors)
    report.bytes += entry.bytes


def _sound_table(layout: Layout, entry: Entry, report: Verified, mend: bool) -> Any | None:
    """A part's rows, if its bytes are those that were written, or can be mended."""
    name, path = f"data/{part_name(entry.part)}.parquet", layout.part_path(entry.part)
    try:
        data = layout.storage.read(path)
    except MissingError:
        report.add(name, "not there, and the manifest has it; copy the dataset again")
        return None
    damage = find_damage(data, entry)
    if damage is not None:
        mended = mend and damage.mended is not None
        report.add(name, damage.what, damage, mendable=damage.mended is not None, mended=mended)
        if damage.mended is None:
            return None
        data = damage.mended
        if mended:
            layout.storage.write(path, data)
    arrow = require("pyarrow", extra="tables")
    try:
        return open_bytes(data, check=True).read()
    except (OSError, arrow.ArrowException) as error:
        report.add(name, str(damaged(name, error)))
        return None


def _faults(table: Any, info: DatasetInfo, entry: Entry, coder: RowCoder | None) -> list[str]:
    """What is wrong with rows whose bytes are right: a writer's fault."""
    faults = []
    if not table.schema.equals(arrow_schema(info)):
        return [f"columns {', '.join(table.schema.names)}, of other names or types than its info asks for"]
    if table.num_rows != entry.rows:
        faults.append(f"{table.num_rows:,} rows, and the manifest says {entry.rows:,}")
    keys = table.column("key").to_pylist()
    distinct = set(keys)
    if len(distinct) + len(entry.errors) != entry.inputs or distinct & broken_keys(entry.errors):
        faults.append(
            f"{len(distinct):,} keys and {len(entry.errors):,} errors, and the shard had {entry.inputs:,} pictures"
        )
    views = table.column("view").to_pylist()
    pairs: dict[tuple[str, int], int] = {}
    for row, pair in enumerate(zip(keys, views, strict=True)):
        if pair in pairs:
            faults.append(f"row {row:,} has the key and view of row {pairs[pair]:,}: {pair[0]!r}, view {pair[1]}")
            break
        pairs[pair] = row
    if views and max(views) >= info.views.count:
        faults.append(f"view {max(views)}, and a picture has {info.views.count}")
    if table.num_rows:
        faults += _token_faults(table, info, keys, coder)
    return faults


def _token_faults(table: Any, info: DatasetInfo, keys: list[str], coder: RowCoder | None) -> list[str]:
    """Tokens that are not as long as their grid asks, or padded otherwise; embeddings that are no unit vectors."""
    table, faults = table.combine_chunks(), []
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
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT))
        if len(bad):
            faults.append(f"row {bad[0]:,} (key {keys[bad[0]]!r}): its embedding is no unit vector")
    return faults


class _Keys:
    """Which keys and views stand in which part. Memory: 16 bytes a row."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, NDArray[np.int64]]] = []
        self._keys: list[NDArray[np.int64]] = []

    def add(self, part: int, table: Any) -> None:
        keys, views = (table.column(name).to_pylist() for name in ("key", "view"))
        pairs = np.fromiter((hash(pair) for pair in zip(keys, views, strict=True)), np.int64)
        distinct, places = np.unique(pairs, return_index=True)
        self.parts.append((part, distinct))
        self._keys.append(np.fromiter((hash(key) for key in keys), np.int64)[places])

    def repeated(self) -> tuple[NDArray[np.int64], int]:
        """Hashes of keys and views that stand in more than one part, and of how many keys they are."""
        if not self.parts:
            return np.empty(0, np.int64), 0
        pairs = np.concatenate([hashes for _, hashes in self.parts])
        values, counts = np.unique(pairs, return_counts=True)
        twice = values[counts > 1]
        return twice, len(np.unique(np.concatenate(self._keys)[np.isin(pairs, twice)]))


def _check_repeated(layout: Layout, seen: _Keys, report: Verified) -> None:
    """One key in two parts: a row that stands twice if the tokens agree; else two shards gave images one name."""
    repeated, num_keys = seen.repeated()
    if not len(repeated):
        return
    wanted, first = repeated[:INSPECTED], dict[tuple[str, int], tuple[int, bytes]]()
    arrow = require("pyarrow", extra="tables")
    example = ""
    for part, hashes in seen.parts:
        if not np.isin(wanted, hashes).any():
            continue
        data = layout.storage.read(layout.part_path(part))
        chosen = set(wanted.tolist())
        try:
            rows = open_bytes(data, check=False).read(columns=["key", "view", "tokens"]).to_pylist()
        except (OSError, arrow.ArrowException):
            continue  # it is among the findings
        for row in rows:
            pair = (row["key"], row["view"])
            if hash(pair) not in chosen:
                continue
            other, tokens = first.setdefault(pair, (part, row["tokens"]))
            if other != part and tokens == row["tokens"]:
                names = f"data/{part_name(other)}.parquet and data/{part_name(part)}.parquet"
                report.add(
                    f"data/{part_name(part)}.parquet", f"key {pair[0]!r}, view {pair[1]} stands twice, in {names}"
                )
                return
            if other != part and not example:
                example = f"{pair[0]!r} in parts {other} and {part}"
    name = "key names" if num_keys == 1 else "keys name"
    report.notes.append(f"{num_keys:,} {name} pictures in more than one part, such as {example}")


def _check_strangers(layout: Layout, parts: Set[int], report: Verified) -> None:
    """Parts that no entry knows: a run was stopped between the two."""
    known = {f"{part_name(part)}.parquet" for part in parts}
    found = (path.rpartition("/")[2] for path in layout.storage.glob(layout.path("data/*.parquet")))
    strange = [name for name in found if name not in known]
    if strange:
        report.notes.append(
            f"data/{strange[0]}{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}: not in the manifest; "
            "the run that wrote it goes on with it"
        )
