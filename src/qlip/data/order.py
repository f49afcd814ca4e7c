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
        self._keys = [
            _mix((key >> 64) + 0x9E3779B97F4A7C15 * number ^ (key & _WORD)) for number in range(ROUNDS)
        ]

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
    by a permutation of (seed, block). A source's slots are numbered through all blocks; number k holds the
    sample k mod size of its epoch k // size, in the order of (seed, source name, epoch): every sample once an
    epoch, whatever the others do.

    Args:
        names: the sources' names, which must differ.
        sizes: how many samples each has.
        weights: their shares, positive, on any scale.
        seed: of the whole order.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int
    ) -> None:
        assert len(names) == len(sizes) == len(weights) > 0 and len(set(names)) == len(names)
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.slots = apportion(weights, BLOCK)
        self._ends = np.cumsum(self.slots).tolist()
        self._cache: dict[int, tuple[int, Permutation]] = {}

    def __getitem__(self, position: int) -> Place:
        block, slot = divmod(position, BLOCK)
        if len(self.slots) == 1:
            source, count = 0, position  # nothing to scatter, and epochs do not overlap
        else:
            slot = self._permutation(-1, block, BLOCK)(slot)
            source = next(number for number, end in enumerate(self._ends) if slot < end)
            owned = self.slots[source]
            count = block * owned + slot - (self._ends[source] - owned)
        epoch, index = divmod(count, self.sizes[source])
        return Place(source, epoch, self._permutation(source, epoch, self.sizes[source])(index))

    def _permutation(self, source: int, epoch: int, size: int) -> Permutation:
        """The last permutation of each source, and of the slots (-1), is kept: neighbours share it."""
        kept = self._cache.get(source)
        if kept is None or kept[0] != epoch:
            parts = ("slots", epoch) if source < 0 else ("order", self.names[source], epoch)
            kept = (epoch, Permutation(size, self.seed, *parts))
            self._cache[source] = kept
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
