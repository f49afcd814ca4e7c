"""Tar shards read from front to back, for those that nobody indexed: counts are not known, and nothing is sought.

The shards of a pass are put in an order by the seed, one pass after the other without end. Shard number t of that row
goes to lane t mod L: a lane is a row of shards of its own, L is part of the recipe, and whoever reads a lane, on
whatever rank and in whatever worker, reads the same samples in the same order. A lane fills a buffer with its next
samples, hands them out in an order drawn from the seed and the place where the buffer began, and fills it again. So its
state is four numbers: which of its shards and which byte of it the buffer began at, how many samples of the buffer were
handed out, and how many of the lane. Going on from there reads one buffer again and nothing else.

A lane that is through with its shard takes its next one without waiting for others, so at the end of a pass some lanes
are already in the next; within a pass every sample comes once. With replacement, each shard of the row is drawn anew
from all: there are no passes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.sampler import Permutation
from qlip.data.shards.tar_index import FileSpan, Member, SampleFiles, groups, split_key, walk
from qlip.data.sources.base import IMAGE_SUFFIXES, RawSample, raw_sample
from qlip.data.storage.chunked_reader import Fetch, open_reader
from qlip.data.storage.retry import StorageError
from qlip.data.storage.storage import Storage, is_remote
from qlip.errors import QLIPError
from qlip.runtime.rng import hash_int


class LaneState(NamedTuple):
    """Where a lane is.

    Attributes:
        shard: which of the lane's own shards the buffer began in, counted from 0.
        offset: of the header in it at which the buffer began, bytes.
        taken: samples of the buffer handed out.
        samples: of the lane handed out, ever.
    """

    shard: int = 0
    offset: int = 0
    taken: int = 0
    samples: int = 0


START = LaneState()


class Drawn(NamedTuple):
    """A sample, or what is wrong with it, and what its augmentation is drawn from: pass, shard and byte."""

    raw: RawSample | SkippedSample
    identity: tuple[int, int, int]


@dataclass(frozen=True)
class TarLanes:
    """Shards dealt to lanes.

    A batch is dealt to `lanes` lanes, in equal contiguous parts; `turns` batches in a row go to different sets of
    lanes. A rank then reads few of the lanes (`lanes` divided by the number of ranks, where that divides it), and a
    worker few of the sets; where it does not divide, several read a lane and each skips what is the others'.

    Attributes:
        name: of the source.
        shards: addresses.
        seed: of order, buffers and draws.
        lanes: of a batch; they divide its size.
        turns: sets of lanes.
        buffer: samples that are mixed, of all lanes together.
        replacement: shards are drawn with replacement.
        caption_field: the json field of the caption; by default ``caption`` and the list ``captions``.
        storage: reads.
    """

    name: str
    shards: tuple[str, ...]
    seed: int
    lanes: int
    turns: int
    buffer: int
    storage: Storage
    replacement: bool = False
    caption_field: str | None = None

    @property
    def total(self) -> int:
        """All lanes."""
        return self.lanes * self.turns

    @property
    def depth(self) -> int:
        """Samples in the buffer of a lane."""
        return max(1, self.buffer // self.total)

    @cached_property
    def digest(self) -> str:
        """Of the shards' addresses: a state belongs to them."""
        return hashlib.blake2b("\n".join(self.shards).encode(), digest_size=8).hexdigest()

    def draw(self, number: int) -> tuple[int, int]:
        """Pass and shard that stand at `number` in the endless row of shards; with replacement each is its own pass."""
        if self.replacement:
            return number, hash_int(self.seed, "draw", self.name, number) % len(self.shards)
        epoch, place = divmod(number, len(self.shards))
        return epoch, Permutation(len(self.shards), self.seed, "shards", self.name, epoch)(place)

    def lane_at(self, batch: int, place: int, batch_size: int) -> int:
        """The lane that fills a place of a batch."""
        return batch % self.turns * self.lanes + place * self.lanes // batch_size

    def first(self, count: int) -> Iterator[RawSample]:
        """The first readable samples in the order of the shards, for a look at them."""
        lanes = (Lane(self, n % self.total, LaneState(n // self.total)) for n in range(len(self.shards)))
        drawn = (one.raw for lane in lanes for one in lane.one_shard())
        return itertools.islice((raw for raw in drawn if isinstance(raw, RawSample)), count)


@dataclass
class _Entry:
    """A sample in the buffer: where it lies, or, of a store, its bytes."""

    address: str
    identity: tuple[int, int, int]
    group: SampleFiles | None  # None: `reason` says what is wrong with the shard
    reason: str = ""
    data: dict[int, bytes] | None = None


class Lane:
    """One lane of `TarLanes`, read by whoever needs its samples.

    Args:
        source: what it is a lane of.
        number: which.
        state: where to go on.
    """

    def __init__(self, source: TarLanes, number: int, state: LaneState = START) -> None:
        self.source, self.number, self.state = source, number, state
        self._entries = self._from(state.shard, state.offset)
        self._buffer: list[_Entry] = []
        self._after = (state.shard, state.offset)

    def next(self) -> Drawn:
        """The next sample.

        Raises:
            StorageError: a store that failed for good. What is wrong with one sample or shard is handed out instead.
        """
        entry = self._pop()
        return Drawn(self._read(entry), entry.identity)

    def skip(self, count: int) -> None:
        """Leave samples to others."""
        for _ in range(count):
            self._pop()

    def close(self) -> None:
        """Ask for nothing more."""
        self._entries.close()

    def one_shard(self) -> Iterator[Drawn]:
        """The rest of the shard it is in, unmixed."""
        own = self.source.draw(self.number + self.state.shard * self.source.total)
        for entry, (shard, _) in self._entries:
            if entry.identity[:2] != own:
                return  # behind its last image lay something else
            yield Drawn(self._read(entry), entry.identity)
            if shard != self.state.shard:
                return

    def _pop(self) -> _Entry:
        if not self._buffer:
            self._fill()
        entry = self._buffer.pop()
        shard, offset, taken, samples = self.state
        begin = (shard, offset, taken + 1) if self._buffer else (*self._after, 0)
        self.state = LaneState(*begin, samples + 1)
        return entry

    def _fill(self) -> None:
        """Fill the buffer from where it began, less what was handed out of it."""
        shard, offset, taken, _ = self.state
        found = []
        for entry, after in self._entries:
            found.append(entry)
            self._after = after
            if len(found) == self.source.depth:
                break
        parts = self.source.seed, "buffer", self.source.name, self.number, shard, offset
        order = Permutation(len(found), *parts).many(np.arange(len(found)))
        self._buffer = [found[place] for place in reversed(order[taken:].tolist())]

    def _from(self, shard: int, offset: int) -> Generator[tuple[_Entry, tuple[int, int]], None, None]:
        """Samples from a byte of a shard on, without end, each with the shard and byte where the next one begins."""
        while True:
            epoch, chosen = self.source.draw(self.number + shard * self.source.total)
            address, reason, empty = self.source.shards[chosen], "", offset == 0
            try:
                with open_reader(address, self.source.storage) as (fetch, length):
                    data: dict[int, bytes] | None = {} if is_remote(address) else None
                    for group, after in groups(_keeping(walk(fetch, length, address, offset), fetch, data)):
                        if group.image is None:
                            continue
                        empty = False
                        entry = _Entry(address, (epoch, chosen, group.start), group)
                        if data is not None:
                            entry.data = {part.offset: data[part.offset] for part in group.files.values()}
                            for old in [at for at in data if at < max(entry.data)]:
                                del data[old]
                        yield entry, (shard, after) if after >= 0 else (shard + 1, 0)
            except StorageError:
                raise
            except QLIPError as error:
                reason = str(error)
            if empty and not reason:
                reason = f"{address}: no picture in it; it should hold {', '.join(IMAGE_SUFFIXES)} files"
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
            text, record = (self._bytes(entry, group.files.get(suffix)) for suffix in ("txt", "json"))
            where = f"{entry.address}: {group.key}"
            return raw_sample(
                group.key, where, self._bytes(entry, image) or b"", text, record, self.source.caption_field
            )
        except StorageError:
            raise
        except QLIPError as error:
            return SkippedSample(group.key, name, str(error))

    def _bytes(self, entry: _Entry, part: FileSpan | None) -> bytes | None:
        if part is None:
            return None
        if entry.data is not None:
            return entry.data[part.offset]
        return self.source.storage.read(entry.address, part.offset, part.size)


def _keeping(members: Iterator[Member], fetch: Fetch, data: dict[int, bytes] | None) -> Iterator[Member]:
    """Members, and the bytes of those that mean something put by as they go past, for a store is not asked twice."""
    for member in members:
        if data is not None and split_key(member.name)[1] in (*IMAGE_SUFFIXES, "txt", "json"):
            data[member.offset] = fetch(member.offset, member.size)
        yield member


def choose_lanes(
    lanes: int | None, turns: int | None, shards: int, batch_size: int, replacement: bool, where: str
) -> tuple[int, int]:
    """Lanes of a batch and turns: as asked for, or as many as there are shards for, 8 and 4 at most.

    Raises:
        QLIPError: the lanes do not divide the batch, or there are fewer shards than lanes.
    """
    if lanes is not None and batch_size % lanes:
        fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= 2 * lanes]
        raise QLIPError(f"{where}: {lanes} lanes do not divide the batch of {batch_size}; {fitting[-1]} would")
    enough = 10**9 if replacement else shards  # a lane without a shard would never fill its places
    if lanes is None:
        lanes = max(n for n in range(1, 9) if batch_size % n == 0 and (n == 1 or n * (turns or 1) <= enough))
    if turns is None:
        turns = max(n for n in (1, 2, 4) if n == 1 or lanes * n <= enough)
    if lanes * turns > enough:
        raise QLIPError(
            f"{where}: {lanes} lanes x {turns} turns are more than its {shards} shards; lower them, or cut it into more"
        )
    return lanes, turns
