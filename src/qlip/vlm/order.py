"""Order of conversations in training: a pure function from positions to numbers of conversations, epoch by epoch.

`Shuffled` is a permutation per epoch. `Grouped` also makes batches of conversations that are alike: with images or
without, and of similar length. Lengths are counted where they are needed, a window of batches at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qlip.data.loader.sampler import Mixture, Numbers, Permutation
from qlip.runtime.rng import generator

WINDOW = 8
"""Batches whose conversations are sorted by length together."""


class Order(Protocol):
    """An endless order of a number of conversations."""

    def __call__(self, positions: Numbers) -> Numbers:
        """Return the number of the conversation at each position, int64 (n,)."""


class Shuffled:
    """Each conversation once per epoch, in an order that changes with the epoch.

    Args:
        size: number of conversations.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._source = Mixture(["conversations"], [size], [1.0], seed, [partial(shuffled, size, seed)])

    def __call__(self, positions: Numbers) -> Numbers:
        """See `Order`."""
        return self._source.places(positions).indices


def shuffled(size: int, seed: int, epoch: int) -> Permutation:
    """Permutation of an epoch."""
    return Permutation(size, seed, "conversations", epoch)


class Grouped:
    """Each conversation once per epoch; those of a batch are all with images or all without, and of similar length.

    What is left over of both kinds, less than two batches, is mixed at the ends of an epoch.

    Args:
        has_images: bool (size,).
        lengths: counts tokens of conversations by their numbers, int64 (n,); a pure function.
        batch_size: positions per batch.
        seed: of the order.
    """

    def __init__(
        self, has_images: NDArray[np.bool_], lengths: Callable[[Numbers], Numbers], batch_size: int, seed: int
    ) -> None:
        self.has_images, self.lengths, self.batch_size, self.seed = has_images, lengths, batch_size, seed
        self._open()

    def _open(self) -> None:
        # an epoch's order, and the windows around the current batch: reading goes forward
        self._epoch = lru_cache(maxsize=2)(self._windows)
        self._window = lru_cache(maxsize=2)(self._sorted)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()

    def __call__(self, positions: Numbers) -> Numbers:
        """See `Order`."""
        epochs, inside = np.divmod(positions, len(self.has_images))
        found = np.empty_like(inside)
        for place, (epoch, index) in enumerate(zip(epochs.tolist(), inside.tolist(), strict=True)):
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, index, side="right"))
            begin = int(ends[window - 1]) if window else 0
            found[place] = self._window(epoch, window)[index - begin]
        return found

    def _windows(self, epoch: int) -> tuple[list[Numbers], Numbers]:
        """Conversations of an epoch's windows and the windows' ends; the first and the last are what is left over."""
        size, batch = len(self.has_images), self.batch_size
        order = shuffled(size, self.seed, epoch).many(np.arange(size))
        kinds = [order[self.has_images[order]], order[~self.has_images[order]]]
        whole = [len(kind) // batch * batch for kind in kinds]
        head = -epoch * size % batch  # positions of the batch that began in the last epoch
        while sum(map(len, kinds)) - sum(whole) < head and any(whole):
            whole[whole.index(max(whole))] -= batch
        step = WINDOW * batch
        windows = [
            kind[begin : min(begin + step, end)]
            for kind, end in zip(kinds, whole, strict=True)
            for begin in range(0, end, step)
        ]
        windows = [windows[place] for place in generator(self.seed, "windows", epoch).permutation(len(windows))]
        rest = np.concatenate([kind[end:] for kind, end in zip(kinds, whole, strict=True)])
        rest = rest[generator(self.seed, "rest", epoch).permutation(len(rest))]
        windows = [rest[:head], *windows, rest[head:]]
        return windows, np.cumsum([len(one) for one in windows])

    def _sorted(self, epoch: int, window: int) -> Numbers:
        """Order of a window: batches of similar length, themselves in a random order, and random inside."""
        windows, _ = self._epoch(epoch)
        found = windows[window]
        if window in (0, len(windows) - 1):
            return found
        by_length = found[np.argsort(-self.lengths(found), kind="stable")].reshape(-1, self.batch_size)
        rng = generator(self.seed, "batches", epoch, window)
        return np.asarray(rng.permuted(rng.permutation(by_length), axis=1).reshape(-1))
