"""Merge, split and sample token datasets into new ones; resumable, the sources are only read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.card import write_card
from qlip.archive.dataset.completeness import check_whole, warn_if_partial
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.entropy_coding import open_coder, write_tables
from qlip.archive.dataset.layout import SOURCE, Entry, Layout, digest, entry_bytes
from qlip.archive.dataset.parquet_reader import RowGroups, keys_of, open_bytes, open_part
from qlip.archive.dataset.schema import METADATA_KEY, DatasetInfo, arrow_schema, first_difference, info_of
from qlip.data.loader.sampler import Permutation, apportion
from qlip.errors import QLIPError, require
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.rng import hash_int
from qlip.tokens.entropy.tables import FILE

MAY_DIFFER = ("decoder_fingerprint", "preparation", "dtype", "batch_size", "device", "views", "model")
"""Fields whose differences `merge` notes; a preparation that is not known differs from none."""
SAMPLE_ROWS = 10_000
"""Rows per part of a sample."""


@dataclass(frozen=True)
class BuildResult:
    """Result of building a dataset from others.

    Attributes:
        rows, parts: of the new dataset.
        repeated: number of keys that occur in more than one source.
        examples: some of these keys.
        notes: differences of the sources, one line each.
    """

    rows: int
    parts: int
    repeated: int = 0
    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    layout: Layout
    info: DatasetInfo
    entries: list[Entry] = field(repr=False)

    @classmethod
    def open(cls, layout: Layout) -> _Source:
        return cls(layout, layout.read_info(), layout.manifest())

    def described(self) -> dict[str, str]:
        """Identity of the source, for the plan of the work."""
        return {"address": self.layout.address, "sha256": digest(self.entries)}


def merge_infos(infos: Iterable[tuple[str, DatasetInfo]]) -> DatasetInfo:
    """Merge the infos of parts to the info of their dataset: the first one, with the grid and captions of all.

    Args:
        infos: (name, info) of at least one part.

    Raises:
        QLIPError: two of them differ in a field that must agree.
    """
    rest = iter(infos)
    first_name, first = next(rest)
    grid, captions, preparation = first.grid, first.captions, first.preparation
    columns = dict.fromkeys(first.columns or ())
    for name, other in rest:
        if (differs := first_difference(first, other)) is not None:
            one, another = getattr(first, differs), getattr(other, differs)
            raise QLIPError(
                f"{name}: {differs} {_short(another)}, and {first_name} has {_short(one)}; only datasets of one model's"
                " codes, with equal embeddings and coding, go together"
            )
        if "tiles" in (first.views.fit, other.views.fit) and first.views != other.views:
            raise QLIPError(
                f"{name}: views {other.views.description}, and {first_name} has {first.views.description}; tiles go"
                " together only with tiles of images of one size to work at"
            )
        grid, captions = (grid if grid == other.grid else None), captions or other.captions
        columns |= dict.fromkeys(other.columns or ())
        preparation = preparation if preparation == other.preparation else None
    found = {"grid": grid, "captions": captions, "columns": tuple(columns) or None, "preparation": preparation}
    return first.model_copy(update=found)


def merge(
    sources: Sequence[Layout],
    output: Layout,
    *,
    unique: bool = False,
    drop_duplicates: bool = False,
    allow_partial: bool = False,
    on_progress: OnProgress = no_progress,
) -> BuildResult:
    """All parts of several datasets as one dataset.

    Parts are checked against their checksums, copied and renumbered; they are rewritten only if the columns differ (one
    grid here, many there). A later call with the same arguments resumes.

    Args:
        sources: in the order of the parts of the result.
        output: of the new dataset.
        unique: refuse sources that share keys, before anything is written.
        drop_duplicates: if a key is in several sources, keep the rows of the first one.
        allow_partial: take sources that lack parts, too; the result is what they have.
        on_progress: called after each part.

    Raises:
        QLIPError: the sources do not agree, one of them is damaged, or the output holds something else.
        PartialDatasetError: a source lacks parts.
    """
    opened = [_Source.open(layout) for layout in sources]
    for one in opened:
        check_whole(one.layout, one.entries, allow_partial)
    _refuse_inside(output, sources)
    full = [one for one in opened if one.entries]
    info = merge_infos((one.layout.address, one.info) for one in full)
    repeated, examples = _repeated_keys([RowGroups(one.layout, one.info, one.entries, cache_bytes=0) for one in full])
    if unique and repeated:
        raise QLIPError(
            f"{repeated:,} keys occur in more than one dataset, such as {examples[0]!r}; remove them from one"
        )
    plan = {"merge": [one.described() for one in opened]} | ({"drop_duplicates": True} if drop_duplicates else {})
    begin_dataset(output, info, plan, full[0].layout)
    names = _shard_names(full)
    done, number, seen = output.finished(), 0, set[str]()
    for one in full:
        keys = set[str]()
        for entry in one.entries:
            wanted = entry.model_copy(update={"part": number, "shard": next(names)})
            if number not in done or done[number].shard != wanted.shard:
                _copy(one, entry, output, info, wanted, seen)
            if drop_duplicates:
                keys |= _part_keys(one, entry)
            on_progress(1)
            number += 1
        seen |= keys
    rows = finish_dataset(output, info)
    return BuildResult(rows, number, repeated, examples, tuple(_differences(full)))


def split(
    source: Layout,
    shares: Mapping[str, float],
    *,
    by: Literal["rows", "parts"] = "rows",
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> dict[str, BuildResult]:
    """Split a dataset into several disjoint ones.

    By rows, a hash of seed and key assigns each image: its views stay together, shares are approximate, and images that
    are added later move no others. By parts, whole parts are copied, and shares are as exact as that allows.

    Args:
        source: to split.
        shares: addresses of the outputs and their positive shares, on any scale.
        by: ``rows`` or ``parts``.
        seed: of the assignment.
        on_progress: called after each part.

    Raises:
        QLIPError: fewer than two outputs, shares that are not positive, fewer parts than outputs, an output that holds
            something else, or a damaged part.
    """
    outputs = {Layout(address, source.storage): share for address, share in shares.items()}
    if len({output.address for output in outputs}) < 2 or not all(0 < share < math.inf for share in outputs.values()):
        raise QLIPError(f"{source.address}: a split has two outputs at least, each with a finite share above 0")
    opened = _Source.open(source)
    warn_if_partial(source, opened.entries)
    if by == "parts" and len(opened.entries) < len(outputs):
        raise QLIPError(
            f"{source.address}: {len(opened.entries)} parts for {len(outputs)} datasets; split by rows instead"
        )
    dealt = _dealt(opened, outputs, seed) if by == "parts" else dict.fromkeys(outputs, opened.entries)
    infos = {output: _info_of(opened, entries) if by == "parts" else opened.info for output, entries in dealt.items()}
    for output in outputs:
        _refuse_inside(output, [source])
        how = {"split": opened.described(), "shares": list(shares.values()), "by": by, "seed": seed}
        begin_dataset(output, infos[output], how | {"place": list(outputs).index(output)}, source)
    if by == "parts":
        _split_parts(opened, dealt, on_progress)
    else:
        _split_rows(opened, outputs, seed, on_progress)
    return {
        output.address: BuildResult(finish_dataset(output, infos[output]), len(output.finished())) for output in outputs
    }


def sample_rows(size: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Draw `count` random rows of `size`, ascending; all rows if there are fewer."""
    chosen: NDArray[np.int64] = np.sort(Permutation(max(1, size), seed, "sample").many(np.arange(min(count, size))))
    return chosen


def sample(source: TokenDataset, output: Layout, count: int, seed: int = 0) -> BuildResult:
    """Make a dataset of random rows of another, in its order.

    Raises:
        QLIPError: the output holds something else, or a damaged part.
    """
    arrow = require("pyarrow", extra="tables")
    rows = sample_rows(len(source), count, seed)
    if not len(rows):
        raise QLIPError(f"{source.layout.address}: no row to sample")
    described = _Source(source.layout, source.info, source.entries).described()
    _refuse_inside(output, [source.layout])
    begin_dataset(output, source.info, {"sample": described, "rows": count, "seed": seed}, source.layout)
    schema = arrow_schema(source.info)
    done = output.finished()
    for part, start in enumerate(range(0, len(rows), SAMPLE_ROWS)):
        if part in done:
            continue
        chosen = rows[start : start + SAMPLE_ROWS]
        columns = [source.groups.take(chosen, name) for name in schema.names]
        table = arrow.Table.from_arrays(columns, schema=schema)
        keys = len(set(table.column("key").to_pylist()))
        output.write_part(source.info, part, f"sample {part}", keys, table)
    return BuildResult(finish_dataset(output, source.info), -(-len(rows) // SAMPLE_ROWS))


def _dealt(source: _Source, outputs: Mapping[Layout, float], seed: int) -> dict[Layout, list[Entry]]:
    """Assign parts to outputs."""
    counts = apportion(list(outputs.values()), len(source.entries))
    order = Permutation(len(source.entries), seed, "split").many(np.arange(len(source.entries)))
    places = np.split(order, np.cumsum(counts)[:-1])
    return {
        output: [source.entries[place] for place in np.sort(some).tolist()]
        for output, some in zip(outputs, places, strict=True)
    }


def _info_of(source: _Source, entries: Sequence[Entry]) -> DatasetInfo:
    """Return the info of a dataset of some of the parts, each of which has its own."""
    paths = [source.layout.part_path(entry.part) for entry in entries]
    files = ((path, open_part(path, source.layout.storage)) for path in paths)
    return merge_infos((path, info_of(file.schema_arrow.metadata, path)) for path, file in files)


def _split_parts(source: _Source, dealt: Mapping[Layout, Sequence[Entry]], on_progress: OnProgress) -> None:
    for output, entries in dealt.items():
        done = output.finished()
        for entry in entries:
            if entry.part not in done:
                _copy(source, entry, output, source.info, entry)
            on_progress(1)


def _split_rows(source: _Source, outputs: Mapping[Layout, float], seed: int, on_progress: OnProgress) -> None:
    arrow = require("pyarrow", extra="tables")
    bounds = np.cumsum(list(outputs.values())) / sum(outputs.values())
    done = {output: output.finished() for output in outputs}

    def drawn(key: str) -> int:
        return min(int(np.searchsorted(bounds, hash_int(seed, "split", key) / 2**128, side="right")), len(bounds) - 1)

    for entry in source.entries:
        if not all(entry.part in found for found in done.values()):
            table = _table(_part(source, entry))
            homes = np.array([drawn(key) for key in table.column("key").to_pylist()], dtype=np.int64)
            for number, output in enumerate(outputs):
                rows = table.take(arrow.array(np.flatnonzero(homes == number)))
                errors = [one for one in entry.errors if drawn(one.key) == number]
                inputs = len(set(rows.column("key").to_pylist())) + len(errors)
                if entry.part not in done[output]:
                    output.write_part(source.info, entry.part, entry.shard, inputs, rows, errors)
        on_progress(1)


def _part_keys(source: _Source, entry: Entry) -> set[str]:
    """Return the keys of a part's rows and skipped images."""
    keys = keys_of(open_part(source.layout.part_path(entry.part), source.layout.storage))
    return keys | {one.key for one in entry.errors}


def _copy(
    source: _Source,
    entry: Entry,
    output: Layout,
    info: DatasetInfo,
    wanted: Entry,
    dropped: Set[str] = frozenset(),
) -> None:
    """Check and copy a part; rewrite it only if the columns differ, or rows of some keys are dropped."""
    data = _part(source, entry)
    if dropped and dropped & _part_keys(source, entry):
        table = _fitted(_table(data), info, output.address)
        is_kept = np.array([key not in dropped for key in table.column("key").to_pylist()], dtype=bool)
        kept = table.filter(require("pyarrow", extra="tables").array(is_kept))
        errors = [one for one in entry.errors if one.key not in dropped]
        images = len(set(kept.column("key").to_pylist())) + len(errors)
        output.write_part(info, wanted.part, wanted.shard, images, kept, errors)
        return
    if all(getattr(source.info, name) == getattr(info, name) for name in ("token_bytes", "captions", "columns")):
        output.storage.write(output.part_path(wanted.part), data)
        output.storage.write(output.entry_path(wanted.part), entry_bytes(wanted))
        return
    table = _fitted(_table(data), info, output.address)
    output.write_part(info, wanted.part, wanted.shard, wanted.inputs, table, wanted.errors)


def _fitted(table: Any, info: DatasetInfo, where: str) -> Any:
    """Cast a part's rows to the columns of a dataset of several grids, or with captions."""
    arrow = require("pyarrow", extra="tables")
    own = info_of(table.schema.metadata, where).model_copy(
        update={name: getattr(info, name) for name in ("grid", "captions", "columns")}
    )
    schema = arrow_schema(own)
    columns = [
        table.column(one.name).cast(one.type) if one.name in table.schema.names else arrow.nulls(len(table), one.type)
        for one in schema
    ]
    return arrow.Table.from_arrays(columns, schema=schema.with_metadata({METADATA_KEY: own.to_json().encode()}))


def _part(source: _Source, entry: Entry) -> bytes:
    path = source.layout.part_path(entry.part)
    data = source.layout.storage.read(path)
    if not entry.describes(data):
        raise QLIPError(f"{path}: damaged; run `qlip tokens verify {source.layout.address}`")
    return data


def _table(data: bytes) -> Any:
    return open_bytes(data).read()


def begin_dataset(output: Layout, info: DatasetInfo, plan: Mapping[str, object], source: Layout | None) -> None:
    """Begin a dataset, or resume one of the same plan; the tables of an entropy coder are copied from a source."""
    work = output.workspace(plan, of="dataset", record=SOURCE)
    if not work.done(SOURCE):
        if output.exists():
            raise QLIPError(f"{output.address}: holds another dataset; choose another folder, or delete this one")
        output.check_empty()
    work.claim()
    if output.exists() and output.read_info() == info:
        return
    if source is not None and info.coding == "entropy":
        open_coder(source, info)
        write_tables(output, source.storage.read(source.path(FILE)))
    output.write_info(info)


def finish_dataset(output: Layout, info: DatasetInfo) -> int:
    """Write the manifest and the card of a dataset; returns its number of rows."""
    entries = list(output.finished().values())
    output.write_manifest(entries)
    write_card(output, info, entries)
    output.remove_leftovers()
    return sum(entry.rows for entry in entries)


def _refuse_inside(output: Layout, sources: Sequence[Layout]) -> None:
    if output.address.rstrip("/") in {source.address.rstrip("/") for source in sources}:
        raise QLIPError(f"{output.address}: is one of the sources; give another output folder")


def _shard_names(sources: Sequence[_Source]) -> Iterator[str]:
    """Yield the shard names of all parts; a name that two sources use gets the source's index in front."""
    seen: dict[str, int] = {}
    for place, source in enumerate(sources):
        for name in {entry.shard for entry in source.entries}:
            seen[name] = place if name not in seen else -1
    for place, source in enumerate(sources):
        for entry in source.entries:
            yield entry.shard if seen[entry.shard] == place else f"{place}/{entry.shard}"


def _repeated_keys(sources: Sequence[RowGroups]) -> tuple[int, tuple[str, ...]]:
    """Return the number of keys in more than one dataset, and examples. Memory: 8 bytes per image."""
    seen, twice = np.empty(0, np.int64), np.empty(0, np.int64)
    for source in sources:
        hashes = np.unique(np.fromiter((hash(key) for key in _keys(source)), np.int64))
        twice = np.union1d(twice, np.intersect1d(seen, hashes, assume_unique=True))
        seen = np.union1d(seen, hashes)
    if not len(twice):
        return 0, ()
    few, found = set(twice[:5].tolist()), dict[str, None]()
    for source in sources:
        found |= dict.fromkeys(key for key in _keys(source) if hash(key) in few)
        if len(found) >= len(few):
            break
    return len(twice), tuple(found)


def _keys(groups: RowGroups) -> Iterator[str]:
    for part in range(len(groups.parts)):
        for group in range(len(groups.group_ends(part))):
            yield from groups.table(part, group, ["key"]).column(0).to_pylist()


def _differences(sources: Sequence[_Source]) -> Iterator[str]:
    first = sources[0]
    for other in sources[1:]:
        for name in MAY_DIFFER:
            one, another = getattr(first.info, name), getattr(other.info, name)
            if one != another and not (name == "preparation" and None in (one, another)):
                yield f"{name}: {first.layout.address} has {_short(one)}, {other.layout.address} {_short(another)}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
