"""Tar shards without an index, streamed from front to back, behind the same `Feed` as indexed sources.

`StreamedShards` puts the shards of each pass in an order drawn from the seed, one pass after the other without end, and
deals them to cursors: shard number t of that sequence goes to cursor t mod C. A `ShardCursor` reads its shards one
after the other: it fills a buffer with its next samples, hands them out in an order drawn from the seed and the place
where the buffer began, and fills it again. A `CursorState` is four numbers: the shard and byte where the buffer began,
the samples taken from the buffer, and the samples taken in all. Resuming reads only one buffer again. C is part of the
recipe, so a cursor gives the same samples whichever rank and worker reads it.

`MixedStream` mixes `StreamedSource`s with indexed ones, and `StreamedFeed` reads it for the ranks of a training run.

A cursor that has finished its shard takes its next one without waiting, so at the end of a pass some cursors are
already in the next; within a pass every sample comes once. With replacement, each shard is drawn from all: there are no
passes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from qlip.data.loader.batch import Batch, SkippedSample, TextFaults, Tokenize
from qlip.data.loader.feed import State, check_layout, common_position, share_of
from qlip.data.loader.sampler import Permutation
from qlip.data.loader.stream import BaseSource, Source, SourceMixture
from qlip.data.loader.workers import round_robin_workers
from qlip.data.shards.tar_index import ANNOTATIONS, FileSpan, Member, SampleFiles, groups, split_dotted, walk
from qlip.data.shards.texts_apart import TextsApart, apart_message, key_apart
from qlip.data.sources.base import IMAGE_SUFFIXES, RawSample, printable, raw_sample
from qlip.data.storage.chunked_reader import Fetch, open_reader
from qlip.data.storage.retry import StorageError
from qlip.data.storage.storage import Storage, is_remote
from qlip.errors import QLIPError
from qlip.runtime.rng import hash_int


class CursorState(NamedTuple):
    """Position of a cursor.

    Attributes:
        shard: number, among the cursor's own shards, of the shard in which the buffer began.
        offset: byte of the tar header in that shard at which the buffer began.
        taken: samples taken from the buffer.
        samples: samples taken from the cursor since its start.
    """

    shard: int = 0
    offset: int = 0
    taken: int = 0
    samples: int = 0


START = CursorState()

CursorUpdates = dict[int, dict[int, CursorState]]
"""New states of cursors, by source and cursor."""


class CursorSample(NamedTuple):
    """A sample, or the reason to skip it, and the identity that seeds its augmentation: pass, shard and byte."""

    raw: RawSample | SkippedSample
    identity: tuple[int, int, int]


@dataclass(frozen=True)
class StreamedShards:
    """Shards dealt to cursors.

    A batch is dealt to `num_cursors` cursors, in equal contiguous parts, and consecutive batches take turns between
    `cursor_sets` sets of cursors. If the number of ranks divides `num_cursors`, each rank reads only its share of a
    set's cursors, and each worker only some of the sets. Otherwise several processes read a cursor, and each skips the
    samples of the others.

    Attributes:
        name: of the source.
        shards: addresses.
        seed: seed of order, buffers and draws.
        num_cursors: cursors that share a batch; a divisor of the batch size.
        cursor_sets: sets of that many cursors.
        buffer: size of the shuffle buffers of all cursors together, in samples.
        replacement: shards are drawn with replacement.
        caption_field: the json field of the caption; by default ``caption`` and the list ``captions``.
        storage: reads.
        captions: False if captions are not used; then shards whose captions lie apart from their images are read.
    """

    name: str
    shards: tuple[str, ...]
    seed: int
    num_cursors: int
    cursor_sets: int
    buffer: int
    storage: Storage
    replacement: bool = False
    caption_field: str | None = None
    captions: bool = True

    @property
    def total_cursors(self) -> int:
        """Number of cursors in all sets."""
        return self.num_cursors * self.cursor_sets

    @property
    def cursor_buffer(self) -> int:
        """Size of the buffer of one cursor, in samples."""
        return max(1, self.buffer // self.total_cursors)

    @cached_property
    def digest(self) -> str:
        """Digest of the shards' addresses; a state is only valid for equal addresses."""
        return hashlib.blake2b("\n".join(self.shards).encode(), digest_size=8).hexdigest()

    def draw(self, number: int) -> tuple[int, int]:
        """Return pass and shard at `number` in the endless sequence of shards; with replacement each is a pass."""
        if self.replacement:
            return number, hash_int(self.seed, "draw", self.name, number) % len(self.shards)
        epoch, place = divmod(number, len(self.shards))
        return epoch, Permutation(len(self.shards), self.seed, "shards", self.name, epoch)(place)

    def cursor_at(self, batch: int, place: int, batch_size: int) -> int:
        """Return the number of the cursor that fills a place of a batch."""
        return batch % self.cursor_sets * self.num_cursors + place * self.num_cursors // batch_size

    def first(self, count: int) -> Iterator[RawSample]:
        """Iterate over the first readable samples in the order of the shards.

        Raises:
            QLIPError: no sample of any shard can be read; the error is that of the last one.
        """
        cursors = (
            ShardCursor(self, n % self.total_cursors, CursorState(n // self.total_cursors))
            for n in range(len(self.shards))
        )
        samples = (one.raw for cursor in cursors for one in cursor.one_shard())
        found, reason = 0, ""
        for raw in samples if count else ():
            if isinstance(raw, RawSample):
                yield raw
                found += 1
                if found == count:
                    return
            else:
                reason = raw.reason
        if reason and not found:
            raise QLIPError(f"no sample of {self.name} can be read: {reason}")


@dataclass
class _Entry:
    """A sample in the buffer: its location and, from remote storage, its bytes."""

    address: str
    identity: tuple[int, int, int]
    group: SampleFiles | None  # None: the shard cannot be read, for `reason`
    reason: str = ""
    data: dict[int, bytes] | None = None
    apart: list[str] = field(default_factory=list)
    """Keys whose captions or labels were found apart from their images, here or before the next image."""


class ShardCursor:
    """One cursor of `StreamedShards`: an endless sequence of samples.

    Args:
        source: the shards.
        number: of the cursor.
        state: state to continue from.
    """

    def __init__(self, source: StreamedShards, number: int, state: CursorState = START) -> None:
        self.source, self.number, self.state = source, number, state
        self._entries = self._from(state.shard, state.offset)
        self._buffer: list[_Entry] = []
        self._after = (state.shard, state.offset)

    def next(self) -> CursorSample:
        """Read the next sample.

        Raises:
            StorageError: the storage failed for good. An unreadable sample or shard is returned as a `SkippedSample`.
        """
        entry = self._pop()
        return CursorSample(self._read(entry), entry.identity)

    def skip(self, count: int) -> None:
        """Advance without reading the samples."""
        for _ in range(count):
            self._pop()

    def close(self) -> None:
        """End reading."""
        self._entries.close()

    def one_shard(self) -> Iterator[CursorSample]:
        """Read the rest of the current shard, unshuffled."""
        own = self.source.draw(self.number + self.state.shard * self.source.total_cursors)
        for entry, (shard, _) in self._entries:
            if entry.identity[:2] != own:
                return  # the rest of the shard has no image
            yield CursorSample(self._read(entry), entry.identity)
            if shard != self.state.shard:
                return

    def _pop(self) -> _Entry:
        if not self._buffer:
            self._fill()
        entry = self._buffer.pop()
        shard, offset, taken, samples = self.state
        begin = (shard, offset, taken + 1) if self._buffer else (*self._after, 0)
        self.state = CursorState(*begin, samples + 1)
        return entry

    def _fill(self) -> None:
        """Fill the buffer from its first sample on, without the samples that were taken from it."""
        shard, offset, taken, _ = self.state
        found = []
        for entry, after in self._entries:
            found.append(entry)
            self._after = after
            if len(found) == self.source.cursor_buffer:
                break
        parts = self.source.seed, "buffer", self.source.name, self.number, shard, offset
        order = Permutation(len(found), *parts).many(np.arange(len(found)))
        self._buffer = [found[place] for place in reversed(order[taken:].tolist())]

    def _from(self, shard: int, offset: int) -> Generator[tuple[_Entry, tuple[int, int]], None, None]:
        """Iterate over samples from a byte of a shard on, each with the shard and byte where the next one begins."""
        while True:
            epoch, chosen = self.source.draw(self.number + shard * self.source.total_cursors)
            address, reason, empty = self.source.shards[chosen], "", offset == 0
            apart = TextsApart()
            waiting: tuple[_Entry, tuple[int, int]] | None = None  # until the files before the next sample are known
            try:
                with open_reader(address, self.source.storage) as (fetch, length):
                    if self.source.captions and (key := key_apart(fetch, length, address)) is not None:
                        raise QLIPError(apart_message(address, [key]))
                    data: dict[int, bytes] | None = {} if is_remote(address) else None
                    for group, after in groups(_keeping(walk(fetch, length, address, offset), fetch, data)):
                        if group.image is None:
                            apart.add(group, waiting and waiting[0].apart)
                            continue
                        if waiting is not None:
                            yield waiting
                        empty = False
                        entry = _Entry(address, (epoch, chosen, group.start), group)
                        apart.add(group, entry.apart)
                        if data is not None:
                            entry.data = {part.offset: data[part.offset] for part in group.files.values()}
                            for old in [at for at in data if at < max(entry.data)]:
                                del data[old]
                        waiting = entry, (shard, after) if after >= 0 else (shard + 1, 0)
            except StorageError:
                raise
            except QLIPError as error:
                reason = str(error)
            if waiting is not None:
                yield waiting
            if empty and not reason:
                reason = f"{address}: no image in it; it should hold {', '.join(IMAGE_SUFFIXES)} files"
            shard, offset = shard + 1, 0
            if reason:
                yield _Entry(address, (epoch, chosen, -1), None, reason), (shard, 0)

    def _read(self, entry: _Entry) -> RawSample | SkippedSample:
        group, name = entry.group, self.source.name
        if group is None:
            return SkippedSample(entry.address, name, entry.reason)
        try:
            if group.duplicate:
                raise QLIPError(
                    f"{entry.address}: holds {group.key}.{group.duplicate} twice; each file name may occur once"
                )
            image = group.image
            assert image is not None
            text, record, cls = (self._bytes(entry, group.files.get(suffix)) for suffix in ANNOTATIONS)
            where, data = f"{entry.address}: {group.key}", self._bytes(entry, image) or b""
            raw = raw_sample(printable(group.key), where, data, text, record, cls, self.source.caption_field)
            return replace(raw, text_fault=apart_message(entry.address, entry.apart)) if entry.apart else raw
        except StorageError:
            raise
        except QLIPError as error:
            return SkippedSample(printable(group.key), name, printable(str(error)))

    def _bytes(self, entry: _Entry, part: FileSpan | None) -> bytes | None:
        if part is None:
            return None
        if entry.data is not None:
            return entry.data[part.offset]
        return self.source.storage.read(entry.address, part.offset, part.size)


def _keeping(members: Iterator[Member], fetch: Fetch, data: dict[int, bytes] | None) -> Iterator[Member]:
    """Iterate over members and keep the bytes of images and captions in `data`, so that storage is read once."""
    for member in members:
        if data is not None and split_dotted(member.name)[1] in (*IMAGE_SUFFIXES, *ANNOTATIONS):
            data[member.offset] = fetch(member.offset, member.size)
        yield member


def choose_cursors(
    num_cursors: int | None, cursor_sets: int | None, shards: int, batch_size: int, replacement: bool, where: str
) -> tuple[int, int]:
    """Choose the cursors per batch and the number of sets: as given, or as many as the shards allow, up to 8 and 4.

    Raises:
        QLIPError: the cursors do not divide the batch, or there are fewer shards than cursors.
    """
    if num_cursors is not None and batch_size % num_cursors:
        fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= 2 * num_cursors]
        raise QLIPError(
            f"{where}: num_cursors {num_cursors} does not divide the batch size {batch_size}; {fitting[-1]} would"
        )
    enough = 10**9 if replacement else shards  # a cursor without a shard has no samples
    if num_cursors is None:
        fitting = [n for n in range(1, 9) if batch_size % n == 0 and (n == 1 or n * (cursor_sets or 1) <= enough)]
        num_cursors = max(fitting)
    if cursor_sets is None:
        cursor_sets = max(n for n in (1, 2, 4) if n == 1 or num_cursors * n <= enough)
    if num_cursors * cursor_sets > enough:
        raise QLIPError(
            f"{where}: num_cursors {num_cursors} x cursor_sets {cursor_sets} is more than its {shards} shards; lower"
            " them, or use more shards"
        )
    return num_cursors, cursor_sets


@dataclass(frozen=True)
class StreamedSource(BaseSource):
    """Shards that are streamed from front to back."""

    images: StreamedShards


class MixedStream(SourceMixture[Source | StreamedSource]):
    """Weighted mixture of indexed and streamed sources.

    A position of an indexed source holds the same sample as in a `TrainingStream`. A position of a streamed source
    takes the next sample of the cursor that its place in the batch belongs to. So a batch depends only on the seed, its
    number and the states of the cursors, not on the rank or worker that reads it.

    Args:
        sources: at least one, of different names.
        seed: of order, augmentation and captions.
        tokenize: see `Tokenize`.
        batch_size: positions per batch, of all ranks.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """

    def __init__(
        self, sources: Sequence[Source | StreamedSource], seed: int, tokenize: Tokenize, batch_size: int
    ) -> None:
        super().__init__(sources, seed, tokenize)
        self.batch_size = batch_size
        self.streamed = {n: s.images for n, s in enumerate(self.sources) if isinstance(s, StreamedSource)}


@dataclass(frozen=True)
class StreamedFeed:
    """Feed of a mixed stream; a state also has the states of all cursors."""

    stream: MixedStream
    num_workers: int = 0
    prefetch: int = 4

    @property
    def batch_size(self) -> int:
        """Positions per batch, of all ranks."""
        return self.stream.batch_size

    @property
    def sources(self) -> list[Source | StreamedSource]:
        """Sources in the order of the recipe."""
        return self.stream.sources

    def open(self, state: State | None, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, State]]:
        """See `qlip.data.loader.feed.Feed.open`."""
        position, cursors = 0 if state is None else int(state["position"]), self._cursors(state)
        check_layout(self.batch_size, position, self.num_workers, rank, world)
        shares = _RankShares(self.stream, position, {n: dict(at) for n, at in cursors.items()}, rank, world)
        with closing(TextFaults()) as faults:
            for batch, updates in round_robin_workers(shares, self.num_workers, self.prefetch):
                position += self.batch_size
                for number, states in updates.items():
                    cursors.setdefault(number, {}).update(states)
                faults.add(batch.text_faults)
                yield batch, self._state(position, cursors)

    def merge(self, states: Sequence[State]) -> State:
        """See `qlip.data.loader.feed.Feed.merge`."""
        position = common_position([state["position"] for state in states])
        cursors: CursorUpdates = {}
        for state in states:
            for number, of_source in self._cursors(state).items():
                known = cursors.setdefault(number, {})
                for cursor, at in of_source.items():
                    if cursor not in known or known[cursor].samples < at.samples:  # the rank that read it last
                        known[cursor] = at
        return self._state(position, cursors)

    def _state(self, position: int, cursors: CursorUpdates) -> State:
        """State as JSON; its keys are those of version 0.1, in which cursors were called lanes."""
        return {
            "position": position,
            "lanes": {
                source.name: {
                    "lanes": source.num_cursors,
                    "turns": source.cursor_sets,
                    "shards": source.digest,
                    "at": {str(cursor): list(at) for cursor, at in sorted(cursors.get(number, {}).items())},
                }
                for number, source in self.stream.streamed.items()
            },
        }

    def _cursors(self, state: State | None) -> CursorUpdates:
        """Return the cursors of a state.

        Raises:
            QLIPError: the state is of other sources.
        """
        found: CursorUpdates = {}
        if state is None:
            return found
        saved = dict(state.get("lanes", {}))
        for number, source in self.stream.streamed.items():
            one = saved.pop(source.name, None)
            if one is None:
                raise QLIPError(f"data: the saved state has no source {source.name!r}; use the same sources")
            if one["shards"] != source.digest:
                raise QLIPError(f"{source.name}: other shards than in the saved state; use the same shards")
            if (one["lanes"], one["turns"]) != (source.num_cursors, source.cursor_sets):
                raise QLIPError(
                    f"{source.name}: num_cursors {source.num_cursors} and cursor_sets {source.cursor_sets}, but the"
                    f" state was saved with num_cursors: {one['lanes']}, cursor_sets: {one['turns']}; set these"
                )
            found[number] = {int(cursor): CursorState(*at) for cursor, at in one["at"].items()}
        if saved:
            names = ", ".join(map(repr, saved))
            raise QLIPError(f"data: the saved state streams {names}, the recipe does not; set 'streaming: true' there")
        return found


@dataclass(frozen=True)
class _RankShares:
    """A rank's shares of the batches of a mixed stream, for `round_robin_workers`.

    Each item is a batch and the new states of the cursors that took part in it. A worker skips the samples of its
    cursors that belong to batches of other workers or ranks; if the numbers divide each other, there are none.

    Attributes:
        stream: read.
        start: the first position.
        states: of the cursors there; a cursor that is not in it is at its start.
        rank, world: of this process.
    """

    stream: MixedStream
    start: int
    states: Mapping[int, Mapping[int, CursorState]]
    rank: int
    world: int

    def items(self, worker: int, workers: int) -> Iterator[tuple[Batch, CursorUpdates]]:
        """Iterate over the batches of one worker."""
        size = self.stream.batch_size
        cursors = _WorkerCursors(self.stream, self.states, share_of(size, self.rank, self.world))
        try:
            for number in itertools.count():
                first = self.start + number * size
                if number % workers == worker:
                    cursors.prepare(first)
                    cursors.prepare(first + workers * size)
                    yield cursors.take(first)
                else:
                    cursors.skip(first, number - worker, workers)
        finally:
            cursors.close()


class _WorkerCursors:
    """Cursors of one worker: those that its rank's share of a batch may read."""

    def __init__(
        self, stream: MixedStream, states: Mapping[int, Mapping[int, CursorState]], share: tuple[int, int]
    ) -> None:
        self.stream, self.states = stream, states
        self.low, self.high = share
        self._cursors: dict[tuple[int, int], ShardCursor] = {}
        self._spans = {number: self._span(shards) for number, shards in stream.streamed.items()}

    def take(self, first: int) -> tuple[Batch, CursorUpdates]:
        """Read this rank's share of the batch that begins at a position."""
        stream, size = self.stream, self.stream.batch_size
        low = min([self.low, *(span[0] for span in self._spans.values())])
        high = max([self.high, *(span[1] for span in self._spans.values())])
        sources, epochs, indices = (array.tolist() for array in stream.mixture.places(first + np.arange(low, high)))
        builder = stream.builder(self.high - self.low)
        updates: CursorUpdates = {}
        for place, number, epoch, index in zip(range(low, high), sources, epochs, indices, strict=True):
            mine = self.low <= place < self.high
            if number in self._spans:
                begin, end = self._spans[number]
                if begin <= place < end:
                    cursor = self._cursor(number, stream.streamed[number].cursor_at(first // size, place, size))
                    if mine:
                        raw, identity = cursor.next()
                        stream.add(builder, number, raw, *identity)
                    else:
                        cursor.skip(1)
                    updates.setdefault(number, {})[cursor.number] = cursor.state
            elif mine:
                stream.add(builder, number, stream.read(number, index), epoch, index)
        return builder.finish(), updates

    def skip(self, first: int, distance: int, workers: int) -> None:
        """Skip the samples that a batch of another worker takes from cursors that this worker reads too."""
        size, batch = self.stream.batch_size, first // self.stream.batch_size
        for number, shards in self.stream.streamed.items():
            if distance % math.gcd(workers, shards.cursor_sets):
                continue  # this worker reads none of its cursors
            begin, end = self._spans[number]
            sources = self.stream.mixture.sources_at(first + np.arange(begin, end))
            part = size // shards.num_cursors
            for place in range(begin, end, part):
                count = int((sources[place - begin : place - begin + part] == number).sum())
                self._cursor(number, shards.cursor_at(batch, place, size)).skip(count)

    def prepare(self, first: int) -> None:
        """Prefetch this rank's share of a batch, of indexed sources in remote storage."""
        self.stream.prepare(first + np.arange(self.low, self.high))

    def close(self) -> None:
        """End reading."""
        for cursor in self._cursors.values():
            cursor.close()
        self.stream.close()

    def _span(self, shards: StreamedShards) -> tuple[int, int]:
        """Return the places of a batch that belong to the cursors of this share: whole parts of the batch."""
        part = self.stream.batch_size // shards.num_cursors
        return self.low // part * part, -(-self.high // part) * part

    def _cursor(self, source: int, number: int) -> ShardCursor:
        key = source, number
        if key not in self._cursors:
            state = self.states.get(source, {}).get(number, START)
            self._cursors[key] = ShardCursor(self.stream.streamed[source], number, state)
        return self._cursors[key]
