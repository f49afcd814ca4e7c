"""Drawing ids from logits: `Sampling`, in LlamaGen's order of temperature and filters, and counter-based noise.

`AnswerSettings` are the sampling that a language model's folder asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qlip.errors import QLIPError, check_integer, validate_json
from qlip.files import write_text

FILE = "generation_config.json"
"""File of a model's folder that holds `AnswerSettings`."""
LEAST_TEMPERATURE = 1e-5
"""LlamaGen's."""
LARGEST_UNIFORM = 1.0 - 2.0**-52
"""Largest uniform whose product with any sum is rounded to less than that sum."""


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
            logits: (B, V) floating; -inf is never drawn.
            uniforms: (B,) float64 in [0, 1), one per draw; unused at temperature 0.
            allowed: bool (V,) or (B, V), ids that may be drawn; None allows all.

        Returns:
            (B,) int64, never an id of probability 0.

        Raises:
            QLIPError: logits that are NaN or +inf, or a row with nothing allowed.
        """
        finite = logits.is_meta or math.isfinite(float(logits.sum()))
        if not finite and not bool((logits < math.inf).all()):
            raise QLIPError("logits that are not finite: the model or its input is broken, take an earlier checkpoint")
        if allowed is not None:
            if not logits.is_meta and not bool(allowed.any(-1).all()):
                raise QLIPError("no value is allowed at a step; check the rule that says which are allowed")
            logits = logits.masked_fill(~allowed, -math.inf)
        if not finite and not bool((logits.amax(-1) > -math.inf).all()):
            raise QLIPError("all logits of a step, or of its allowed values, are -inf; leave at least one to draw")
        if self.temperature == 0:
            return logits.argmax(-1)
        return draw_from(self.probabilities(logits), uniforms)


def draw_from(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an id per row in proportion to weights, by the inverse of the cumulative distribution in float64.

    Args:
        weights: (..., V), none negative, with a positive sum per row that need not be 1.
        uniforms: (...) float64 in [0, 1).

    Returns:
        (...) int64, the first id whose cumulative weight exceeds uniform * sum; its weight is above 0.
    """
    summed = weights.to(torch.float64, copy=True).cumsum_(-1)
    reached = uniforms.clamp(max=LARGEST_UNIFORM)[..., None] * summed[..., -1:]
    return torch.searchsorted(summed, reached, right=True)[..., 0]


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
        words = bits.random_raw(num_tokens * draws)  # a stream that NumPy never changes, other than its Generator's
        row[:] = ((words >> np.uint64(11)) * 2.0**-53).reshape(num_tokens, draws)
    return torch.from_numpy(found)


class AnswerSettings(BaseModel):
    """Settings of answers, under the names of transformers' GenerationConfig; its other keys are not followed.

    Attributes:
        do_sample: draw tokens; else the likeliest ones are taken, and the next four are not used.
        temperature, top_k, top_p, min_p: see :class:`Sampling`; None is no filter.
        max_new_tokens: longest answer in tokens.
        eos_token_id: ids that end an answer, besides the tokenizer's and the template's.
        single_turn: a turn of a conversation is answered without the texts of earlier ones, as by a model that was
            trained on single questions; its images stay until others are shown. Not a setting of transformers.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    eos_token_id: int | list[int] | None = None
    single_turn: bool = False

    def sampling(self, temperature: float | None = None) -> Sampling:
        """Sampling of answers, with another temperature where one is given.

        Raises:
            QLIPError: a temperature or filter out of range.
        """
        if temperature is None:
            temperature = (1.0 if self.temperature is None else self.temperature) if self.do_sample else 0.0
        if temperature == 0:
            return Sampling(temperature=0.0)
        return Sampling(
            temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
            self.min_p or 0.0,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the settings of a folder; the defaults if it has none.

        Raises:
            QLIPError: a broken file, or values of another type or out of range.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        found = validate_json(cls, path.read_bytes(), str(path), remedy="fetch it again, or delete it")
        try:
            found.sampling()
        except QLIPError as error:
            raise QLIPError(f"{path}: {error}") from None
        return found

    def save(self, folder: Path) -> None:
        """Write the settings that are not the defaults; no file if there are none."""
        if self != type(self)():
            write_text(folder / FILE, self.model_dump_json(exclude_defaults=True, indent=2) + "\n")
