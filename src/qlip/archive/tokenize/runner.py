"""Run that tokenises the shards which are missing in a dataset, part by part.

An engine yields a shard's batches as `Piece`s, in any order and, after a worker died, some of them twice. `Run` writes
a part when all pieces of its shard are there. `encode_here` is the engine of this process; `on_ray` has the other
and makes the same bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from qlip.archive.dataset.card import write_card
from qlip.archive.dataset.entropy_coding import write_tables
from qlip.archive.dataset.layout import SOURCE, Entry, Layout, entry_bytes
from qlip.archive.dataset.parquet_reader import open_bytes
from qlip.archive.dataset.provenance import SourceRecord, SourceShard
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.tokenize.encoder import Encoder
from qlip.archive.tokenize.inputs import InputShard, InputShards
from qlip.archive.tokenize.preprocess import ReadyBatch, ShardEnd, Work, batches_of, from_bytes, table_of, to_bytes
from qlip.data.storage.retry import DeniedError
from qlip.data.storage.storage import is_remote, local_path
from qlip.errors import QLIPError, require
from qlip.runtime.workspace import lock_folder

QUEUE = 4
"""Decoded batches that wait for the model."""


@dataclass(frozen=True)
class Piece:
    """Output of an engine: rows of a batch, the end of a shard, or why a shard cannot be read.

    Attributes:
        part: number of the shard and of its part.
        number: index of the batch.
        table: rows of the batch, with their positions.
        end: end of the shard.
        failed: error of the shard in one line.
    """

    part: int
    number: int = -1
    table: Any = None
    end: ShardEnd | None = None
    failed: str | None = None


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        entries: all finished parts in order, those of earlier runs too.
        failed: (shard, reason) of shards that could not be read.
        made: parts that this run made.
        images: images of these parts, skipped ones too.
        text_faults: why captions, labels or columns of these images were left out, empty or repaired, a
            line for each image.
        seconds: duration.
    """

    entries: list[Entry] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    made: int = 0
    images: int = 0
    text_faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """Images of all finished parts."""
        return sum(entry.inputs for entry in self.entries)

    @property
    def rows(self) -> int:
        """Rows of all finished parts."""
        return sum(entry.rows for entry in self.entries)

    @property
    def skipped(self) -> int:
        """Images of all finished parts that are in no row."""
        return sum(len(entry.errors) for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of all finished parts."""
        return sum(entry.bytes for entry in self.entries)


@contextmanager
def lock_dataset(layout: Layout) -> Iterator[None]:
    """Hold the lock of a dataset's folder, so that no second run removes its temporary files.

    Take it before a `Run` is made. In a store there is no lock; two runs there do the work twice, with equal bytes.

    Raises:
        QLIPError: another run holds it, or there can be no folder.
    """
    if is_remote(layout.address):
        yield
        return
    message = "another `qlip tokenize` is running here; wait for it, or give another folder"
    with lock_folder(local_path(layout.address), message):
        yield


class Run:
    """Run that tokenises an input into a folder, or resumes an earlier run.

    Args:
        layout: of the dataset.
        inputs: all shards.
        work: model, views and columns.
        append: the input may have further shards, which become further parts.
        retry_errors: read the images again that an earlier run could not; their rows are added to their parts.

    Raises:
        QLIPError: the folder holds other files, or tokens of another input or with other settings.
    """

    def __init__(
        self, layout: Layout, inputs: InputShards, work: Work, *, append: bool = False, retry_errors: bool = False
    ) -> None:
        self.layout, self.inputs, self.work = layout, inputs, work
        if layout.exists():
            old = layout.read_info()
            before = _refuse_another(layout, old, work.info)
            written = layout.written()
            if append:
                self.inputs = inputs = _appended(layout, before, inputs, written)
            elif (difference := _repaired(before, inputs, written).difference(inputs.record())) is not None:
                hint = ""
                with suppress(QLIPError):
                    _appended(layout, before, inputs, written)
                    hint = ", or append to this dataset"
                raise QLIPError(
                    f"{layout.address}: holds another input's tokens: {difference}; take another folder{hint}"
                )
            sizes, now = [one.digest for one in before.shards], [one.digest for one in inputs.shards]
            self._other_source = append or sizes != now
            self.finished = layout.present(map(layout.settled, written.values()))
            self._interrupted = [part for part in self.finished if written[part].before is not None]
        else:
            layout.check_empty()
            self.finished, self._interrupted, self._other_source = {}, [], True
        self.todo = [(part, shard) for part, shard in enumerate(inputs.shards) if part not in self.finished]
        for part, entry in self.finished.items() if retry_errors else ():
            if keys := frozenset(error.key for error in entry.errors):
                self.todo.append((part, replace(inputs.shards[part], retried=keys, count=len(keys))))

    def begin(self) -> None:
        """Write the dataset's description, unless an earlier run did, and the record of an input that changed."""
        for part in self._interrupted:
            self.layout.storage.write(self.layout.entry_path(part), entry_bytes(self.finished[part]))
        if self._other_source:
            self.layout.storage.write(self.layout.path(SOURCE), (self.inputs.record().to_json() + "\n").encode())
            if self.work.tables is not None:
                write_tables(self.layout, self.work.tables)
            self.layout.write_info(self.layout.read_info() if self.layout.exists() else self.work.info)
        else:
            self.layout.renew_sums()

    def write_parts(
        self, pieces: Iterator[Piece], on_piece: Callable[[int, bool], None] = lambda images, part: None
    ) -> Outcome:
        """Write parts until there are no more pieces; at the end, or when stopped, write the manifest.

        Args:
            pieces: of the shards in `todo`.
            on_piece: called with the number of images whose first rows are new, and whether a part ended.

        Raises:
            QLIPError: the storage cannot be written, the pieces end too early, or a part has a wrong number of rows.
        """
        outcome, began = Outcome(), time.monotonic()
        collected = {part: _Collected() for part, _ in self.todo}
        clean = False
        try:
            for piece in pieces:
                images, done = self._take(piece, collected, outcome)
                on_piece(images, done)
            clean = True
        finally:
            outcome.seconds = time.monotonic() - began
            outcome.entries = self._entries
            if clean:
                self.layout.write_manifest(outcome.entries)
                write_card(self.layout, self.work.info, outcome.entries)
                self.layout.remove_leftovers()
            else:  # keep the error that ended the run
                with suppress(QLIPError):
                    self.layout.write_manifest(outcome.entries)
        if any(not one.closed for one in collected.values()):
            raise QLIPError(f"{self.layout.address}: the workers ended early; the same command resumes the run")
        _check_sums(outcome.entries, self.work.info, self.layout.address)
        return outcome

    def _take(self, piece: Piece, collected: dict[int, _Collected], outcome: Outcome) -> tuple[int, bool]:
        """Return the number of images whose first rows are new, and whether the shard is done."""
        so_far = collected[piece.part]
        if so_far.closed or piece.number in so_far.tables:
            return 0, False  # sent twice: a worker died after sending it
        if piece.failed is not None:
            so_far.close()
            outcome.failed.append((self.inputs.shards[piece.part].name, piece.failed))
            return 0, True
        if piece.end is not None:
            so_far.end = piece.end
        else:
            so_far.tables[piece.number] = to_bytes(piece.table)
        images = 0 if piece.table is None else piece.table.column("view").to_pylist().count(0)
        end = so_far.end
        if end is None or len(so_far.tables) < end.batches:
            return images, False
        shard, info = self.inputs.shards[piece.part], self.work.info
        table = table_of(info, [from_bytes(so_far.tables[number]) for number in sorted(so_far.tables)], end, shard.name)
        so_far.close()
        before = self.finished.get(piece.part)
        if before is None:
            entry = self.layout.write_part(info, piece.part, shard.name, end.inputs, table, end.errors)
            self.finished[piece.part] = entry
        elif not table.num_rows and end.inputs == len(before.errors):  # read again, and none of them is readable
            return images, True
        else:  # some of its images were read again
            try:
                table = self._joined(before, end, table)
            except QLIPError as error:
                outcome.failed.append((shard.name, str(error)))
                return images, True
            self.finished[piece.part] = self.layout.write_part(
                info, piece.part, shard.name, before.inputs, table, end.errors, before
            )
            self.layout.write_manifest(self._entries)  # readers compare the part with it
        outcome.made += 1
        outcome.images += end.inputs
        outcome.text_faults += end.text_faults
        return images, True

    @property
    def _entries(self) -> list[Entry]:
        return [self.finished[part] for part in sorted(self.finished)]

    def _joined(self, entry: Entry, end: ShardEnd, table: Any) -> Any:
        """Return the rows of a part, followed by those of images that were read again.

        Raises:
            QLIPError: the shard changed, the part is damaged, or an image read again has the key of another one.
        """
        if end.inputs != len(entry.errors):
            raise QLIPError(
                f"{entry.shard}: has not all images that {self.layout.entry_path(entry.part)} lists as errors"
            )
        path, arrow = self.layout.part_path(entry.part), require("pyarrow", extra="tables")
        data = self.layout.storage.read(path)
        if not entry.describes(data):
            raise QLIPError(f"{path}: damaged; run `qlip tokens verify`")
        before = open_bytes(data).read().cast(table.schema)
        if twice := set(before.column("key").to_pylist()) & set(table.column("key").to_pylist()):
            raise QLIPError(f"{entry.shard}: an image that was read again has the key of another one: {min(twice)}")
        return arrow.concat_tables([before, table]).combine_chunks()


@dataclass
class _Collected:
    """Batches of one shard that have arrived, by number.

    Tables are kept as bytes: their own small buffers, freed among the pixels of other batches, fragment the heap
    (peak memory of 10,000 CIFAR-10 images: 1,160 MiB, and 520 MiB as bytes, at the same speed).
    """

    tables: dict[int, bytes] = field(default_factory=dict)
    end: ShardEnd | None = None
    closed: bool = False

    def close(self) -> None:
        """End the shard and free its tables."""
        self.closed, self.tables = True, {}


def encode_here(
    todo: Sequence[tuple[int, InputShard]], encoder: Encoder, work: Work, threads: int
) -> Generator[Piece, None, None]:
    """Encode shards in this process: threads read and decode ahead, the calling thread runs the model.

    Args:
        todo: shards with their numbers.
        encoder: runs the model.
        work: preprocessing and views.
        threads: that decode.

    Raises:
        DeniedError: access to an image is denied; all others would fail too.
    """
    ready: queue.Queue[tuple[int, ReadyBatch | ShardEnd | QLIPError | OSError] | None] = queue.Queue(QUEUE)
    stop = threading.Event()

    def put(item: tuple[int, ReadyBatch | ShardEnd | QLIPError | OSError] | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for part, shard in todo:
                try:
                    for found in batches_of(shard, work, threads):
                        put((part, found))
                        if stop.is_set():
                            return
                except DeniedError:
                    raise
                except (QLIPError, OSError) as error:
                    put((part, error))
        finally:
            put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="qlip-read") as pool:
        reader = pool.submit(read)
        try:
            while (item := ready.get()) is not None:
                part, found = item
                if isinstance(found, ReadyBatch):
                    yield Piece(part, found.number, encoder(found))
                elif isinstance(found, ShardEnd):
                    yield Piece(part, end=found)
                else:
                    yield Piece(part, failed=" ".join(str(found).split()))
            reader.result()  # raises what ended the reader
        finally:
            stop.set()


def _refuse_another(layout: Layout, old: DatasetInfo, info: DatasetInfo) -> SourceRecord:
    """Refuse a dataset with other settings; return the record of its input."""
    before, wanted = old.model_dump(mode="json"), info.model_dump(mode="json")
    for name in DatasetInfo.model_fields:
        value, now = before.get(name), wanted.get(name)
        if name != "model" and value != now:
            what = (
                name
                if "fingerprint" in name or name == "preparation"
                else f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
            )
            raise QLIPError(
                f"{layout.address}: holds tokens of another run, {what} {_shown(value)}, not {_shown(now)}; give the"
                " same options to resume it, or another folder"
            )
    path = layout.path(SOURCE)
    if not layout.storage.exists(path):
        raise QLIPError(f"{layout.address}: has no {SOURCE}, so no run can resume in it; take another folder")
    return SourceRecord.from_json(layout.storage.read(path), path)


def _repaired(before: SourceRecord, inputs: InputShards, written: Collection[int]) -> SourceRecord:
    """Return the record of an input, with the new size of shards of which there is no part yet."""
    shards = list(before.shards)
    for part, new in enumerate(inputs.record().shards[: len(shards)]):
        if part not in written and shards[part].name == new.name:
            shards[part] = new
    return before.model_copy(update={"shards": tuple(shards)})


def _appended(layout: Layout, before: SourceRecord, inputs: InputShards, written: Collection[int]) -> InputShards:
    """Return the shards that a dataset was made of, in their order, and then the new ones.

    Names are relative to the folder that all files share: with files of a further folder they are longer by a prefix.

    Raises:
        QLIPError: another kind of input, other options of reading, or a shard that is missing or changed.
    """
    record = inputs.record()
    if difference := before.model_copy(update={"shards": ()}).difference(record.model_copy(update={"shards": ()})):
        raise QLIPError(f"{layout.address}: holds another input's tokens: {difference}; take another folder")
    named = {one.name: (one, shard) for one, shard in zip(record.shards, inputs.shards, strict=True)}
    first = before.shards[0].name if before.shards else ""
    prefixes = ["", *(name.removesuffix(first) for name in named if name.endswith(f"/{first}"))]
    lost = [
        [
            one.name
            for part, one in enumerate(before.shards)
            if not _is_same(one, named.get(prefix + one.name), part in written)
        ]
        for prefix in prefixes
    ]
    fitting = [prefix for prefix, names in zip(prefixes, lost, strict=True) if not names]
    if len(fitting) != 1 and "" not in fitting:
        name = lost[0][0] if not fitting else first
        why = "fits several files of this input" if fitting else "changed" if name in named else "is not in this input"
        raise QLIPError(
            f"{layout.address}: its input shard {name!r} {why}; make a dataset of the new images alone and merge both"
        )
    old = [named[fitting[0] + one.name][1] for one in before.shards]
    known = {shard.name for shard in old}
    new = [shard for name, (_, shard) in named.items() if name not in known]
    return replace(inputs, shards=[*old, *new])


def _is_same(old: SourceShard, found: tuple[SourceShard, InputShard] | None, made: bool) -> bool:
    """Return whether a shard is that of an earlier run; of one without a part, only the name counts."""
    if found is None:
        return False
    counted = None not in (old.images, found[0].images)  # an index may have been made since
    return not made or (old.digest == found[0].digest and not (counted and old.images != found[0].images))


_OPTIONS = {
    "columns": "keep-column",
    "embedding_dim": "embeddings",
    "coding": "entropy-code",
    "table_hash": "entropy-code",
}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _check_sums(entries: Sequence[Entry], info: DatasetInfo, address: str) -> None:
    """Check that every part has the rows of each image that was not skipped; of tiles, at least one."""
    for entry in entries:
        images, count = entry.inputs - len(entry.errors), info.views.count
        if entry.rows < images if count is None else entry.rows != images * count:
            raise QLIPError(
                f"{address}: part {entry.part} has {entry.rows:,} rows of {entry.inputs:,} images,"
                f" {len(entry.errors):,} skipped; delete manifest/part-{entry.part:05d}.json and run again"
            )
