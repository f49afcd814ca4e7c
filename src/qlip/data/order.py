"""Which sample stands at which position of an endless stream: pure functions of (seed, position), no state.

Two pieces: a permutation of range(n) that is computed at a point instead of stored, and a mixture that gives
each source its share of every block of positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 1000
"""Positions in which the mixture's shares are exact; the least weight still gets one of them."""
ROUNDS = 6


def hash_int(*parts: object) -> int:
    """A 128-bit number from the parts' text, the same on every machine and in every version."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on the parts alone."""
    return np.random.Generator(np.random.PCG64(hash_int(*parts)))


class Permutation:
    """A pseudo-random permutation of range(size) in constant memory: a Feistel network with cycle walking.

    (Luby and Rackoff, 1988; Black and Rogaway, 2002.) The network permutes the least power of four that holds
    `size`; a value outside goes through it again, fewer than 4 times on average.
    """

    def __init__(self, size: int, *parts: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        key = hash_int(*parts)
        self._keys = [_mix((key >> 64) + 0x9E3779B97F4A7C15 * number ^ (key & _WORD)) for number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes; a bijection of range(size)."""
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & self._mask)
            index = left << self._half | right
            if index < self.size:
                return index


_WORD = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele et al., 2014): every input bit moves every output bit."""
    value &= _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


@dataclass(frozen=True)
class Place:
    """What stands at a position: sample `index` of source `source`, in that source's pass `epoch`."""

    source: int
    epoch: int
    index: int


class Mixture:
    """Weighted mixture of sources, each walked in an order of its own that is new in each epoch.

    Positions come in blocks of `BLOCK`; in each, source i owns about weight_i / sum * BLOCK slots, scattered
    by a permutation of (seed, block). The k-th slot of a source, counted from position 0, holds the sample
    k mod size of its epoch k // size, in the order of (seed, source name, epoch): every sample once an epoch,
    one epoch after the other, whatever the other sources do.

    Args:
        names: the sources' names, which must differ.
        sizes: how many samples each has.
        weights: their shares, positive, on any scale.
        seed: of the whole order.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(names) == len(sizes) == len(weights) > 0 and len(set(names)) == len(names)
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.slots = apportion(weights, BLOCK)
        self._block: tuple[int, list[tuple[int, int]]] = (-1, [])
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def __getitem__(self, position: int) -> Place:
        block, slot = divmod(position, BLOCK)
        source, rank = self._layout(block)[slot]
        epoch, index = divmod(block * self.slots[source] + rank, self.sizes[source])
        return Place(source, epoch, self._order(source, epoch)(index))

    def _layout(self, block: int) -> list[tuple[int, int]]:
        """For each slot of a block, its source and its rank among that source's slots; the last block is kept."""
        if self._block[0] != block:
            owners = [source for source, count in enumerate(self.slots) for _ in range(count)]
            scatter = Permutation(BLOCK, self.seed, "slots", block)
            taken = [0] * len(self.slots)
            layout = []
            for slot in range(BLOCK):
                source = owners[scatter(slot)]
                layout.append((source, taken[source]))
                taken[source] += 1
            self._block = (block, layout)
        return self._block[1]

    def _order(self, source: int, epoch: int) -> Permutation:
        """A source's order in an epoch; its last one is kept, for neighbours share it."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            kept = (epoch, Permutation(self.sizes[source], self.seed, "order", self.names[source], epoch))
            self._orders[source] = kept
        return kept[1]


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` seats by weight, by largest remainders; each gets one at least."""
    assert 0 < len(weights) <= total and all(weight > 0 for weight in weights)
    scale = sum(weights)
    exact = [weight / scale * total for weight in weights]
    seats = [max(1, int(share)) for share in exact]
    while (missing := total - sum(seats)) != 0:
        step = 1 if missing > 0 else -1
        candidates = [i for i in range(len(seats)) if step > 0 or seats[i] > 1]
        seats[max(candidates, key=lambda i: step * (exact[i] - seats[i]))] += step
    return seats
