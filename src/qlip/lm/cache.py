"""Keys and values of past positions, in tensors of fixed size: `KVCache`, and `StaticCache` for compiled steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm.config import DecoderConfig


class KVCache:
    """Static cache of a batch of sequences that advance together.

    Shapes: R sequences, H key-value heads, C positions, d head width.

    Attributes:
        keys, values: per layer, (R, H, C, d).
        start: (R,) int64, first position of each sequence that others may see (left padding), or None.
        length: positions filled.

    Args:
        config: of the decoder.
        rows: R.
        capacity: C; by default the length of a whole sequence.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (rows, config.kv_heads, capacity or config.length, config.head_width)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.start: Tensor | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.keys[0].shape[2]

    @property
    def rows(self) -> int:
        """Number of sequences, R."""
        return self.keys[0].shape[0]

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
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise QLIPError(f"{end} positions do not fit a cache of {self.capacity}; make a longer cache")
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Count positions as filled, after all layers have stored them; a negative number takes the last ones back."""
        self.length += positions

    def select(self, rows: Tensor) -> KVCache:
        """Copy sequences, such as one prefix for several images.

        Args:
            rows: int64, numbers of the sequences, which may repeat.
        """
        return self._with(lambda tensor: tensor.index_select(0, rows))

    def first(self, rows: int) -> KVCache:
        """The first sequences, sharing memory."""
        return self._with(lambda tensor: tensor[:rows])

    def _with(self, change: Callable[[Tensor], Tensor]) -> KVCache:
        other = object.__new__(KVCache)
        other.keys, other.values = [change(one) for one in self.keys], [change(one) for one in self.values]
        other.start = None if self.start is None else change(self.start)
        other.length = self.length
        return other


class StaticCache:
    """Tensors of a `KVCache`, read whole at every step, so that all steps have equal shapes and compile to one graph.

    Attributes:
        position: (1,) int64, position of the next step.

    Args:
        cache: filled with the prefix; its tensors are taken over.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.start = cache.keys, cache.values, cache.start
        self.position = torch.tensor([cache.length], device=cache.keys[0].device)
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
