"""A run: what is missing is made, part by part; each is there whole or not at all.

Workers hand over a shard's batches as `Piece`s, in any order and, where one of them died, some of them twice. A part
is written when all pieces of its shard are there. `pieces_here` is the engine of this process;
`qlip.archive.tokenize.on_ray`
has the other, and makes the same bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from qlip.archive.dataset.card import write_card
from qlip.archive.dataset.entropy_coding import keep_tables
from qlip.archive.dataset.layout import SOURCE, Entry, Layout
from qlip.archive.dataset.provenance import SourceRecord
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.tokenize.encoder import Encoder
from qlip.archive.tokenize.inputs import InputShard, InputShards
from qlip.archive.tokenize.preprocess import ReadyBatch, ShardEnd, Work, batches_of, of_bytes, table_of, to_bytes
from qlip.data.storage.retry import DeniedError, MissingError
from qlip.data.storage.storage import is_remote, local_path
from qlip.errors import QLIPError
from qlip.runtime.workspace import lock_folder

QUEUE = 4
"""Batches that wait decoded for the model."""


@dataclass(frozen=True)
class Piece:
    """What comes out of a worker: a batch's rows, a shard's end, or why the shard cannot be read.

    Attributes:
        part: number of the shard and of its part.
        number: of the batch.
        table: its rows, with their positions.
        end: after the last batch.
        failed: one line.
    """

    part: int
    number: int = -1
    table: Any = None
    end: ShardEnd | None = None
    failed: str | None = None


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        entries: all finished parts, in order; those of earlier runs too.
        failed: (shard, reason) of those that could not be read.
        made: parts of this run.
        images: of these parts, broken ones too.
        seconds: it took.
    """

    entries: list[Entry] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    made: int = 0
    pictures: int = 0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """Images of all finished shards."""
        return sum(entry.inputs for entry in self.entries)

    @property
    def rows(self) -> int:
        """Of all finished parts."""
        return sum(entry.rows for entry in self.entries)

    @property
    def broken(self) -> int:
        """Images that are in no row."""
        return sum(len(entry.errors) for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Of all finished parts."""
        return sum(entry.bytes for entry in self.entries)


@contextmanager
def alone(layout: Layout) -> Iterator[None]:
    """Hold a dataset's folder, from before a `Run` looks into it: two would tidy away each other's work.

    In a store there is no lock; two runs there do the work twice, to the same bytes.

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
    """Tokenising an input into a folder, from where an earlier run was.

    Args:
        layout: of the dataset.
        inputs: all shards.
        work: what is made of them.

    Raises:
        QLIPError: the folder holds something else, or tokens of another input or with other settings.
    """

    def __init__(self, layout: Layout, inputs: InputShards, work: Work) -> None:
        self.layout, self.inputs, self.work = layout, inputs, work
        if layout.exists():
            old = layout.read_info()
            if old.preparation is None:  # of an early version: its missing parts are made as the others were
                self.work = work = replace(work, info=work.info.model_copy(update={"preparation": None}))
            _refuse_another(layout, old, inputs.record(), work.info)
            self.finished = _whole(layout)
        else:
            layout.refuse_foreign()
            self.finished = {}
        self.todo = [(part, shard) for part, shard in enumerate(inputs.shards) if part not in self.finished]

    def begin(self) -> None:
        """Write down what the dataset is of, unless an earlier run did."""
        if not self.layout.exists():
            self.layout.storage.write(self.layout.path(SOURCE), (self.inputs.record().to_json() + "\n").encode())
            if self.work.tables is not None:
                keep_tables(self.layout, self.work.tables)
            self.layout.write_info(self.work.info)

    def drain(self, pieces: Iterator[Piece], told: Callable[[int, bool], None] = lambda images, part: None) -> Outcome:
        """Make parts of pieces until there are no more; then, or when it is stopped, write the manifest.

        Args:
            pieces: of the shards in `todo`.
            told: called with the number of images whose first rows came, and whether a part was completed or ended.

        Raises:
            QLIPError: the store cannot be written, the pieces end too early, or a shard's sums are wrong.
        """
        outcome, began = Outcome(), time.monotonic()
        collected = {part: _Collected() for part, _ in self.todo}
        clean = False
        try:
            for piece in pieces:
                images, done = self._take(piece, collected, outcome)
                told(images, done)
            clean = True
        finally:
            outcome.seconds = time.monotonic() - began
            outcome.entries = [self.finished[part] for part in sorted(self.finished)]
            if clean:
                self.layout.write_manifest(outcome.entries)
                write_card(self.layout, self.work.info, outcome.entries)
                self.layout.tidy()
            else:  # the error that ended it is the one to hear of
                with suppress(QLIPError):
                    self.layout.write_manifest(outcome.entries)
        if any(not one.closed for one in collected.values()):
            raise QLIPError(f"{self.layout.address}: the workers ended early; the same command goes on")
        _check_sums(outcome.entries, self.work.info, self.layout.address)
        return outcome

    def _take(self, piece: Piece, collected: dict[int, _Collected], outcome: Outcome) -> tuple[int, bool]:
        """Return the number of images whose first rows are new, and whether the shard is done."""
        so_far = collected[piece.part]
        if so_far.closed or piece.number in so_far.tables:
            return 0, False  # a worker died after it had sent this, and its shard was read again
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
        table = table_of(info, [of_bytes(so_far.tables[number]) for number in sorted(so_far.tables)], end, shard.name)
        so_far.close()
        entry = self.layout.write_part(info, piece.part, shard.name, end.inputs, table, end.errors)
        self.finished[piece.part] = entry
        outcome.made += 1
        outcome.pictures += end.inputs
        return images, True


@dataclass
class _Collected:
    """What has come of one shard; tables as bytes, for small pieces kept between large ones pin the heap's pages."""

    tables: dict[int, bytes] = field(default_factory=dict)
    end: ShardEnd | None = None
    closed: bool = False

    def close(self) -> None:
        """It is through; keep nothing."""
        self.closed, self.tables = True, {}


def pieces_here(
    todo: Sequence[tuple[int, InputShard]], encoder: Encoder, work: Work, threads: int
) -> Generator[Piece, None, None]:
    """The engine of this process: threads read and decode ahead, this one runs the model.

    Args:
        todo: shards with their numbers.
        encoder: the model.
        work: what is made of them.
        threads: that decode.

    Raises:
        DeniedError: an image may not be read; all others would be broken, too.
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
            reader.result()  # whatever else ended it
        finally:
            stop.set()


def _whole(layout: Layout) -> dict[int, Entry]:
    """Parts whose entry and file are there, the file of the entry's size."""
    entries = layout.finished()
    paths = {layout.part_path(part): entry for part, entry in entries.items()}

    def size(path: str) -> int:
        try:
            return layout.storage.size(path)
        except MissingError:
            return -1

    sizes = layout.storage.map(size, list(paths))
    return {entry.part: entry for entry, found in zip(paths.values(), sizes, strict=True) if found == entry.bytes}


def _refuse_another(layout: Layout, old: DatasetInfo, record: SourceRecord, info: DatasetInfo) -> None:
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
                " same options to go on, or another folder"
            )
    path = layout.path(SOURCE)
    if not layout.storage.exists(path):
        raise QLIPError(f"{layout.address}: has no {SOURCE}, so no run can go on in it; take another folder")
    difference = SourceRecord.from_json(layout.storage.read(path), path).difference(record)
    if difference is not None:
        raise QLIPError(f"{layout.address}: holds another input's tokens: {difference}; take another folder")


_OPTIONS = {"embedding_dim": "embeddings", "coding": "entropy-code", "table_hash": "entropy-code"}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _check_sums(entries: Sequence[Entry], info: DatasetInfo, address: str) -> None:
    """Distinct keys and errors are the inputs, in every part; an image has at least one tile."""
    for entry in entries:
        images, count = entry.inputs - len(entry.errors), info.views.count
        if entry.rows < images if count is None else entry.rows != images * count:
            raise QLIPError(
                f"{address}: part {entry.part} has {entry.rows:,} rows of {entry.inputs:,} pictures,"
                f" {len(entry.errors):,} broken; delete manifest/part-{entry.part:05d}.json and run again"
            )
