"""Order of an endless stream of samples: pure functions from (seed, position) to a sample, without state.

`Permutation` shuffles range(n) and is computed where it is needed instead of stored. `BlockShuffle` shuffles blocks,
for sources where neighbours are cheaper to read together. `Mixture` gives each source its share of every block of
positions, and `ScheduledMixture` lets these shares change from block to block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qlip.runtime.rng import hash_int

Numbers = NDArray[np.int64]

BLOCK = 1000
"""Number of positions in which the shares of a mixture are exact; the smallest weight still gets one of them."""
ROUNDS = 6


class Order(Protocol):
    """A bijection of range(size), for one index or an array."""

    def __call__(self, index: int) -> int: ...

    def many(self, indices: Numbers) -> Numbers:
        """Map an array of indices."""


class Permutation:
    """A pseudo-random permutation of range(size) in constant memory: a Feistel network with cycle walking.

    (Luby and Rackoff, 1988; Black and Rogaway, 2002.) The network permutes range(n), n the least power of
    four that is at least `size`; a result outside range(size) is permuted again, fewer than 4 times on average.
    """

    def __init__(self, size: int, *parts: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        key = hash_int(*parts)
        self._keys = [_mix((key >> 64) + 0x9E3779B97F4A7C15 * number ^ (key & _WORD)) for number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Map an index; a bijection of range(size)."""
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & self._mask)
            index = left << self._half | right
            if index < self.size:
                return index

    def many(self, indices: Numbers) -> Numbers:
        """Map an array of indices."""
        values, half, mask = indices.astype(np.uint64), np.uint64(self._half), np.uint64(self._mask)
        pending = np.arange(len(values))
        while len(pending):
            left, right = values[pending] >> half, values[pending] & mask
            for key in self._keys:
                left, right = right, left ^ (_mix_many(right + np.uint64(key)) & mask)
            values[pending] = left << half | right
            pending = pending[values[pending] >= self.size]
        return values.astype(np.int64)


_WORD = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele et al., 2014): every input bit moves every output bit."""
    value &= _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)  # unsigned products wrap around
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class BlockShuffle:
    """Blocks of consecutive samples in a random order, samples mixed within windows of several blocks.

    For sources where a request reads a whole block as cheaply as one sample. Blocks never cross the border of a file.
    Each epoch has its own order of blocks, and the samples of every `window` blocks are mixed by a permutation, so that
    neighbours in the order come from `window` blocks at most. About 24 bytes of memory per block.

    Args:
        runs: number of consecutive samples in each file; all together are the source.
        block_size: samples per block; a file's last one may be smaller.
        window: blocks mixed with each other.
        parts: seed, name and epoch of the order.
    """

    def __init__(self, runs: Sequence[int], block_size: int, window: int, *parts: object) -> None:
        self._parts = parts
        starts, sizes = cut_blocks(runs, block_size)
        chosen = Permutation(len(starts), *parts, "blocks").many(np.arange(len(starts)))
        self._starts, sizes = starts[chosen], sizes[chosen]
        self._ends = np.cumsum(sizes)
        self._window_ends = np.append(self._ends[window - 1 :: window], self._ends[-1:])
        self._window: tuple[int, Permutation] = (-1, Permutation(1))

    def __call__(self, index: int) -> int:
        """Map an index; a bijection of range(sum(runs))."""
        return int(self.many(np.array([index]))[0])

    def many(self, indices: Numbers) -> Numbers:
        """Map an array of indices."""
        windows = np.searchsorted(self._window_ends, indices, side="right")
        mixed = np.empty_like(indices)
        for number in np.unique(windows):
            inside = windows == number
            begin = int(self._window_ends[number - 1]) if number else 0
            mixed[inside] = begin + self._mixer(int(number), begin).many(indices[inside] - begin)
        blocks = np.searchsorted(self._ends, mixed, side="right")
        return np.asarray(self._starts[blocks] + mixed - np.where(blocks > 0, self._ends[blocks - 1], 0))

    def _mixer(self, number: int, begin: int) -> Permutation:
        if self._window[0] != number:
            size = int(self._window_ends[number]) - begin
            self._window = (number, Permutation(size, *self._parts, "window", number))
        return self._window[1]


def cut_blocks(runs: Sequence[int], block_size: int) -> tuple[Numbers, Numbers]:
    """Cut files of the given lengths into blocks; return the first sample and the size of each."""
    lengths = np.asarray(runs, dtype=np.int64)
    counts = -(-lengths // block_size)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the block in its file
    begins = number * block_size
    return begins + np.repeat(np.cumsum(lengths) - lengths, counts), np.minimum(
        block_size, np.repeat(lengths, counts) - begins
    )


@dataclass(frozen=True)
class Place:
    """The sample at a position: number `index` of source `source`, in that source's epoch `epoch`."""

    source: int
    epoch: int
    index: int


class Places(NamedTuple):
    """The samples at many positions: an array of each attribute of `Place`."""

    sources: Numbers
    epochs: Numbers
    indices: Numbers


OpenOrder = Callable[[int], Order]
"""Makes the order of an epoch from its number."""


class Mixture:
    """Weighted mixture of sources, each in its own order, which changes with every epoch.

    Positions come in blocks of `BLOCK`; in each, source i owns about weight_i / sum * BLOCK slots, scattered
    by a permutation of (seed, block). The k-th slot of a source, counted from position 0, holds the sample
    k mod size of its epoch k // size, in the order of (seed, source name, epoch): every sample once per epoch,
    one epoch after the other, independently of the other sources.

    Args:
        names: the sources' names, which must differ.
        sizes: number of samples of each; None if it is not known: its "index" is then k itself, its epoch 0.
        weights: their shares, positive, on any scale.
        seed: of the whole order.
        orders: for each source, an epoch's order; a permutation of (seed, source name, epoch) by default.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int | None],
        weights: Sequence[float],
        seed: int,
        orders: Sequence[OpenOrder | None] | None = None,
    ) -> None:
        assert len(names) == len(sizes) == len(weights) > 0 and len(set(names)) == len(names)
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.slots = apportion(weights, BLOCK)
        self._open_orders = list(orders) if orders is not None else [None] * len(names)
        self._block: tuple[int, Numbers, Numbers] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self._orders: dict[int, tuple[int, Order]] = {}

    def __getitem__(self, position: int) -> Place:
        sources, epochs, indices = self.places(np.array([position]))
        return Place(int(sources[0]), int(epochs[0]), int(indices[0]))

    def places(self, positions: Numbers) -> Places:
        """Look up the samples at many positions."""
        sources, slots = self._slots(positions)
        epochs, indices = np.zeros_like(positions), slots.copy()
        for source in np.unique(sources):
            size = self.sizes[source]
            if size is None:
                continue
            mine = sources == source
            epochs[mine], inside = np.divmod(slots[mine], size)
            for epoch in np.unique(epochs[mine]):
                there = epochs[mine] == epoch
                inside[there] = self._order(int(source), int(epoch)).many(inside[there])
            indices[mine] = inside
        return Places(sources, epochs, indices)

    def sources_at(self, positions: Numbers) -> Numbers:
        """Look up the sources alone, which is cheap."""
        return self._slots(positions)[0]

    def _slots(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return the source at each position and k, the number of its earlier slots."""
        if len(self.names) == 1:
            return np.zeros_like(positions), positions.copy()
        blocks, slots = np.divmod(positions, BLOCK)
        sources, ranks = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            inside = blocks == block
            owners, taken = self._layout(int(block))
            sources[inside] = owners[slots[inside]]
            ranks[inside] = self.counts_before(int(block))[sources[inside]] + taken[slots[inside]]
        return sources, ranks

    def slots_of(self, block: int) -> list[int]:
        """Number of slots of each source in a block; they add up to `BLOCK`."""
        del block
        return self.slots

    def counts_before(self, block: int) -> Numbers:
        """Number of slots of each source in all blocks before a block, (sources,)."""
        return block * np.array(self.slots)

    def _layout(self, block: int) -> tuple[Numbers, Numbers]:
        """Return each slot's source in a block and its rank among that source's slots; the last block is cached."""
        if self._block[0] != block:
            scatter = Permutation(BLOCK, self.seed, "slots", block).many(np.arange(BLOCK))
            counts = self.slots_of(block)
            owners = np.repeat(np.arange(len(counts)), counts)[scatter]
            taken = np.empty(BLOCK, np.int64)
            for source, count in enumerate(counts):
                taken[owners == source] = np.arange(count)
            self._block = (block, owners, taken)
        return self._block[1:]

    def _order(self, source: int, epoch: int) -> Order:
        """Return the order of a source in an epoch; the last one is cached, since neighbours share it."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            size, open_order = self.sizes[source], self._open_orders[source]
            assert size is not None
            order = (
                open_order(epoch) if open_order else Permutation(size, self.seed, "order", self.names[source], epoch)
            )
            kept = (epoch, order)
            self._orders[source] = kept
        return kept[1]


class ScheduledMixture(Mixture):
    """Mixture whose weights change from block to block; with constant weights it equals `Mixture`.

    A source's k-th slot is counted over all blocks before, so that every sample still comes once per epoch, at any
    position, read in any order. The counts of every `STRIDE`-th block are cached when they are first passed: the first
    access far into a stream costs some 10 microseconds per block before it.

    Args:
        names, sizes, seed, orders: see `Mixture`.
        weights: a block's number to the sources' weights, on any scale; 0 leaves a source out of the block. A pure
            function, as part of the order. Block b holds the positions from b * BLOCK on, so weights w by training step
            are ``lambda block: w(block * BLOCK // batch_size)``.

    Raises:
        ValueError: the weights of a block are not one number >= 0 for each source, with one above 0.
    """

    STRIDE = 1000

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int | None],
        weights: Callable[[int], Sequence[float]],
        seed: int,
        orders: Sequence[OpenOrder | None] | None = None,
    ) -> None:
        super().__init__(names, sizes, [1.0] * len(names), seed, orders)
        self._weights = weights
        self._marks = [np.zeros(len(names), np.int64)]  # counts before blocks 0, STRIDE, 2 * STRIDE, ...
        self._counts = 0, self._marks[0]  # of the last block asked for: reading goes forward
        self._apportioned: tuple[tuple[float, ...], list[int]] = ((), [])
        self.slots = self.slots_of(0)

    def slots_of(self, block: int) -> list[int]:
        """See `Mixture.slots_of`."""
        weights = tuple(self._weights(block))
        if weights != self._apportioned[0]:
            if len(weights) != len(self.names) or not all(0 <= one < math.inf for one in weights) or not any(weights):
                raise ValueError(f"block {block}: weights {weights}; need {len(self.names)} numbers >= 0, not all 0")
            seats = iter(apportion([one for one in weights if one], BLOCK))
            self._apportioned = weights, [next(seats) if one else 0 for one in weights]
        return self._apportioned[1]

    def counts_before(self, block: int) -> Numbers:
        """See `Mixture.counts_before`."""
        at, counts = self._counts
        mark = min(block // self.STRIDE, len(self._marks) - 1)
        if not mark * self.STRIDE <= at <= block:
            at, counts = mark * self.STRIDE, self._marks[mark]
        while at < block:
            counts = counts + self.slots_of(at)
            at += 1
            if at == len(self._marks) * self.STRIDE:
                self._marks.append(counts)
        self._counts = at, counts
        return counts


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` seats by weight, by largest remainders; each gets at least one."""
    assert 0 < len(weights) <= total and all(weight > 0 for weight in weights)
    scale = sum(weights)
    exact = [weight / scale * total for weight in weights]
    seats = [max(1, int(share)) for share in exact]
    while (missing := total - sum(seats)) != 0:
        step = 1 if missing > 0 else -1
        candidates = [i for i in range(len(seats)) if step > 0 or seats[i] > 1]
        seats[max(candidates, key=lambda i: step * (exact[i] - seats[i]))] += step
    return seats
