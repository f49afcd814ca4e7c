"""Drawing ids from logits: `Sampling`, in LlamaGen's order of temperature and filters, and counter-based noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.errors import QLIPError, check_integer

LEAST_TEMPERATURE = 1e-5
"""LlamaGen's."""


@dataclass(frozen=True)
class Sampling:
    """Temperature, then filters, then a draw.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id, the lowest one at ties.
        top_k: ids kept, the likeliest ones and those that tie with the last of them; 0 keeps all.
        top_p: an id is dropped if the likelier ones have more than this probability together.
        min_p: an id is dropped if its probability is less than this times the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k, 0)
        bounds = {"temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise QLIPError(f"{name} {value!r}: give a number from {low:g} to {high:g}")
        if not math.isfinite(self.temperature):
            raise QLIPError(f"temperature {self.temperature!r}: give a finite number")
        if self.top_p == 0:
            raise QLIPError("top_p 0.0 keeps nothing; give more than 0, or temperature 0 for the likeliest id")

    def to_dict(self) -> dict[str, Any]:
        """Settings, for JSON."""
        return asdict(self)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities from which an id is drawn.

        Args:
            logits: (..., V) floating; -inf is never drawn.

        Returns:
            (..., V) float32.
        """
        logits = logits.float() / max(self.temperature, LEAST_TEMPERATURE)
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p < 1:
            ordered, places = logits.sort(dim=-1, descending=True, stable=True)
            shares = ordered.softmax(-1)
            dropped = shares.cumsum(-1) - shares > self.top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, places, dropped), -math.inf)
        found = logits.softmax(-1)
        if self.min_p:
            found = found * (found >= self.min_p * found.amax(-1, keepdim=True))
            found = found / found.sum(-1, keepdim=True)
        return found

    def draw(self, logits: Tensor, uniforms: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Draw an id per row, by the inverse of the cumulative distribution.

        Args:
            logits: (B, V) floating.
            uniforms: (B,) float64 in [0, 1), one per draw; unused at temperature 0.
            allowed: bool (V,) or (B, V), ids that may be drawn; None allows all.

        Returns:
            (B,) int64.

        Raises:
            QLIPError: logits that are not finite, or a row with nothing allowed.
        """
        if not logits.is_meta and not math.isfinite(float(logits.sum())) and not bool(logits.isfinite().all()):
            raise QLIPError("logits that are not finite: the model or its input is broken, take an earlier checkpoint")
        if allowed is not None:
            if not logits.is_meta and not bool(allowed.any(-1).all()):
                raise QLIPError("no value is allowed at a step; check the rule that says which are allowed")
            logits = logits.masked_fill(~allowed, -math.inf)
        if self.temperature == 0:
            return logits.argmax(-1)
        shares = self.probabilities(logits).double()
        summed = shares.cumsum(-1)
        # the last sum instead of 1: a draw may not fall behind it; at equal sums the first id, which has probability
        return torch.searchsorted(summed, (uniforms * summed[:, -1])[:, None], right=True)[:, 0].minimum(
            _last_possible(shares)
        )


def _last_possible(shares: Tensor) -> Tensor:
    """Last id of a probability above 0, (B,); rounding never draws beyond it."""
    count = shares.shape[-1]
    return count - 1 - (shares.flip(-1) > 0).to(torch.uint8).argmax(-1)


def uniforms(seed: int, numbers: Sequence[int], num_tokens: int, draws: int, round_: int = 0) -> Tensor:
    """Noise of images, keyed by (seed, image number, token, draw, round) alone: Philox 4x64.

    Args:
        seed: below 2^64.
        numbers: image numbers, below 2^64.
        num_tokens: N; a value does not depend on it.
        draws: draws per token.
        round_: number of a further set of noise for the same images.

    Returns:
        (B, N, draws) float64 in [0, 1).

    Raises:
        QLIPError: a seed or a number that is no integer from 0 to 2^64 - 1.
    """
    found = np.empty((len(numbers), num_tokens, draws))
    for row, number in zip(found, numbers, strict=True):
        key = [check_integer("seed", seed, 0), check_integer("image number", number, 0)]
        if max(key) >= 1 << 64:
            raise QLIPError(f"seed {seed} and image number {number}: give integers below 2^64")
        bits = np.random.Philox(key=np.array(key, np.uint64), counter=np.array([0, 0, 0, round_], np.uint64))
        row[:] = np.random.Generator(bits).random((num_tokens, draws))
    return torch.from_numpy(found)
