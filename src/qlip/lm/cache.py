"""Keys and values of past positions, in tensors of fixed size: `KVCache`, and `StaticCache` for compiled steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlip.errors import QLIPError

STEP = 256
"""Positions by which the cache of a conversation grows."""


class Sizes(Protocol):
    """Sizes that a decoder's cache has: those of a `DecoderConfig` or a `CausalConfig`."""

    @property
    def num_hidden_layers(self) -> int:
        """Depth."""
        ...

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        ...

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        ...

    @property
    def length(self) -> int:
        """Positions of a whole sequence."""
        ...


class KVCache:
    """Static cache of a batch of sequences that advance together.

    Shapes: R sequences, H key-value heads, C positions, d head width.

    Attributes:
        stored: keys and values, (layers, R, 2, H, C, d).
        start: (R,) int64, first position of each sequence that others may see (left padding), or None.
        padding: bool (R, length), True at positions that no other may see, wherever they are; None is none.
        length: positions filled.

    Args:
        config: of the decoder.
        rows: R.
        capacity: C; by default the length of a whole sequence.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        config: Sizes,
        rows: int,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (config.num_hidden_layers, rows, 2, config.kv_heads, capacity or config.length, config.head_width)
        self.stored = torch.zeros(shape, dtype=dtype, device=device)
        self.start: Tensor | None = None
        self.padding: Tensor | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.stored.shape[4]

    @property
    def rows(self) -> int:
        """Number of sequences, R."""
        return self.stored.shape[1]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new positions behind the filled ones; `advance` then counts them.

        Args:
            layer: number of the layer.
            keys, values: (R, H, Q, d).

        Returns:
            Keys and values of all positions so far, (R, H, length + Q, d), as views.

        Raises:
            QLIPError: the cache is too short.
        """
        end = self._end(keys.shape[2])
        seen = self.stored[layer, :, :, :, :end]  # (R, 2, H, end, d)
        seen[:, 0, :, self.length :] = keys
        seen[:, 1, :, self.length :] = values
        return seen[:, 0], seen[:, 1]

    def next_position(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Views for a step of one position, made for all layers at once.

        Returns:
            For each layer the place of the new keys and values, (R, 2, H, d), then the keys and the values of all
            positions with the new one, (R, H, length + 1, d); `advance` counts it.

        Raises:
            QLIPError: the cache is too short.
        """
        seen = self.stored[..., : self._end(1), :]
        return seen[..., -1, :].unbind(0), seen[:, :, 0].unbind(0), seen[:, :, 1].unbind(0)

    def _end(self, positions: int) -> int:
        end = self.length + positions
        if end > self.capacity:
            raise QLIPError(f"{end} positions do not fit a cache of {self.capacity}; make a longer cache")
        return end

    def advance(self, positions: int) -> None:
        """Count positions as filled, after all layers have stored them; a negative number takes the last ones back."""
        self.length += positions
        if self.padding is not None:
            self.padding = self.padding[:, : self.length]

    def pad(self, steps: int, padded: Tensor | None) -> None:
        """Say which of the next positions are padding, before they are run.

        Args:
            steps: number of positions, Q.
            padded: bool (R, Q); None is none of them.
        """
        if self.padding is None and padded is None:
            return
        none = torch.zeros(self.rows, self.length + steps, dtype=torch.bool, device=self.stored.device)
        before = none[:, : self.length] if self.padding is None else self.padding[:, : self.length]
        self.padding = torch.cat([before, none[:, self.length :] if padded is None else padded], 1)

    def select(self, rows: Tensor) -> KVCache:
        """Copy sequences, such as one prefix for several images.

        Args:
            rows: int64, numbers of the sequences, which may repeat.
        """
        return self._with(self.stored.index_select(1, rows), rows)

    def first(self, rows: int) -> KVCache:
        """The first sequences, sharing memory."""
        return self._with(self.stored[:, :rows], slice(rows))

    def _with(self, stored: Tensor, rows: Tensor | slice) -> KVCache:
        other = object.__new__(KVCache)
        other.stored, other.length = stored, self.length
        other.start = None if self.start is None else self.start[rows]
        other.padding = None if self.padding is None else self.padding[rows]
        return other


class StaticCache:
    """Tensors of a `KVCache`, read whole at every step, so that all steps have equal shapes and compile to one graph.

    Attributes:
        keys, values: per layer, (R, H, C, d).
        position: (1,) int64, position of the next step.

    Args:
        cache: filled with the prefix, which is copied.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys = [one.clone() for one in cache.stored[:, :, 0].unbind()]
        self.values = [one.clone() for one in cache.stored[:, :, 1].unbind()]
        self.start = cache.start
        self.position = torch.tensor([cache.length], device=cache.stored.device)
        for tensor in (*self.keys, *self.values, self.position):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write to them

    @property
    def rows(self) -> int:
        """Number of sequences, R."""
        return self.keys[0].shape[0]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (R, H, 1, d) of the next position; returns those of all positions."""
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        return self.keys[layer], self.values[layer]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask (R or 1, 1, 1, C) of the filled positions and the next, from each sequence's start on."""
        columns = torch.arange(self.keys[0].shape[2], device=self.position.device)
        seen = (columns <= self.position)[None]
        if self.start is not None:
            seen = seen & (columns >= self.start[:, None])
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))[:, None, None]


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common beginning of two sequences, such as of a prompt and of what a cache holds."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
