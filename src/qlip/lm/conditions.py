"""Conditions that an image is drawn from, as the prefix of the sequence: a class, text features, or ids of text.

`Condition` holds the input; each module turns it into a `Prefix` of T positions, and makes the null condition, which
training uses for dropped conditions and guidance for its second branch.

Shapes: B samples, T prefix positions, D width, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.lm.config import DecoderConfig


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    Attributes:
        values: int64 (B,) classes; floating (B, n, C) features; or int64 (B, n) ids of text, n at most T.
        mask: bool or integers (B, n), nonzero where a feature or an id is real, at any place; None if all are.
    """

    values: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    def rows(self, numbers: Sequence[int]) -> Condition:
        """Conditions of these samples."""
        place = torch.as_tensor(numbers, dtype=torch.int64, device=self.values.device)
        return Condition(self.values[place], None if self.mask is None else self.mask[place])

    def to(self, device: torch.device) -> Condition:
        """Copy to a device."""
        return Condition(self.values.to(device), None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class Prefix:
    """The first positions of a sequence.

    Attributes:
        embeddings: (B, T, D).
        start: (B,) int64, first position that others may see; None if all are seen.
    """

    embeddings: Tensor
    start: Tensor | None = None


class ConditionModule(Protocol):
    """Turns conditions into prefixes."""

    def __call__(self, condition: Condition, dropped: Tensor | None = None) -> Prefix:
        """Embed a batch.

        Args:
            condition: of the kind that the module reads.
            dropped: bool (B,), True where the null condition replaces it; None for nowhere.

        Raises:
            QLIPError: another kind of condition, a class or an id out of range, or more than T positions.
        """
        ...

    def null(self, condition: Condition) -> Condition:
        """Return the null condition of each sample, as a condition; LlamaGen's features keep the sample's mask."""
        ...


class ClassCondition(nn.Module):
    """A row per class, and a last one for the null condition."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_classes = config.condition_size
        self.embedding = nn.Embedding(config.condition_size + 1, config.hidden_size)

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Prefix:
        """See :class:`ConditionModule`."""
        labels = condition.values
        if labels.ndim != 1:
            raise QLIPError(f"condition of shape {tuple(labels.shape)}: this decoder needs a class per image, (B,)")
        check_ids(labels, self.num_classes, "class", null=True)
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.num_classes)
        return Prefix(self.embedding(labels)[:, None])

    def null(self, condition: Condition) -> Condition:
        """See :class:`ConditionModule`."""
        return Condition(torch.full_like(condition.values, self.num_classes))


class FeatureCondition(nn.Module):
    """LlamaGen's: fc2(gelu(fc1 x)) of text features; the null condition is a table that is never trained."""

    uncond_embedding: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.length, self.size = config.prefix_length, config.condition_size
        self.fc1 = nn.Linear(self.size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("uncond_embedding", torch.empty(self.length, self.size))

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Prefix:
        """See :class:`ConditionModule`."""
        features = condition.values
        if features.ndim != 3 or features.shape[-1] != self.size or not features.is_floating_point():
            raise QLIPError(
                f"condition of shape {tuple(features.shape)}, {features.dtype}: this decoder needs features (B, n,"
                f" {self.size})"
            )
        features, start = left_padded(condition, self.length)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.uncond_embedding.to(features.dtype), features)
        hidden = F.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh")
        return Prefix(self.fc2(hidden), start)

    def null(self, condition: Condition) -> Condition:
        """See :class:`ConditionModule`; the null features at all T positions, under the mask of the sample."""
        rows = len(condition)
        _, start = left_padded(condition, self.length)
        values = self.uncond_embedding.expand(rows, -1, -1)
        if start is None:
            return Condition(values)
        return Condition(values, torch.arange(self.length, device=start.device) >= start[:, None])


class TokenCondition(nn.Module):
    """A row per id of the text, and a last one, the null id; the null condition is the null id alone."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.length, self.null_id = config.prefix_length, config.condition_size
        self.embedding = nn.Embedding(config.condition_size + 1, config.hidden_size)

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Prefix:
        """See :class:`ConditionModule`."""
        if condition.values.ndim != 2:
            raise QLIPError(
                f"condition of shape {tuple(condition.values.shape)}: this decoder needs ids of text (B, n)"
            )
        check_ids(condition.values, self.null_id, "id", null=True)
        ids, start = left_padded(condition, self.length)
        if dropped is not None:
            last = self.length - 1
            ids = torch.where(dropped[:, None], torch.full_like(ids, self.null_id), ids)
            start = torch.where(dropped, last, torch.zeros_like(dropped, dtype=torch.int64) if start is None else start)
        return Prefix(self.embedding(ids), start)

    def null(self, condition: Condition) -> Condition:
        """See :class:`ConditionModule`."""
        return Condition(condition.values.new_full((len(condition), 1), self.null_id))


def build_condition(config: DecoderConfig) -> ClassCondition | FeatureCondition | TokenCondition:
    """The module for a configuration's kind of condition."""
    if config.condition == "class":
        return ClassCondition(config)
    return FeatureCondition(config) if config.condition == "features" else TokenCondition(config)


def left_padded(condition: Condition, length: int) -> tuple[Tensor, Tensor | None]:
    """Move the real positions to the end of ``length`` positions; the others become zero.

    Args:
        condition: values (B, n, ...) and their mask (B, n).
        length: T.

    Returns:
        (B, T, ...), and the first real position of each sample, (B,) int64, or None if all positions are real.

    Raises:
        QLIPError: a sample has more than T real positions, or none.
    """
    values, mask = condition.values, condition.mask
    rows, given = values.shape[:2]
    if mask is None:
        mask = torch.ones(rows, given, dtype=torch.bool, device=values.device)
    elif mask.shape != (rows, given):
        raise QLIPError(f"mask of shape {tuple(mask.shape)}: need {(rows, given)}, as the values")
    real = mask.bool()
    counts = real.sum(1)  # (B,)
    if not counts.is_meta and rows:
        longest, shortest = int(counts.max()), int(counts.min())
        if longest > length:
            raise QLIPError(f"a caption of {longest} positions is longer than the prefix, {length}; shorten it")
        if not shortest:
            raise QLIPError("a caption without a position: use the null condition for images without a caption")
        if condition.mask is None and given == length:
            return values, None
    start = length - counts
    order = real.to(torch.int64).argsort(dim=1, stable=True)  # padding first, the real ones in their order
    picked = values.gather(1, order.reshape(rows, given, *[1] * (values.ndim - 2)).expand_as(values))
    if given >= length:
        picked = picked[:, given - length :]
    else:
        picked = torch.cat([picked.new_zeros(rows, length - given, *values.shape[2:]), picked], 1)
    padding = torch.arange(length, device=values.device) < start[:, None]  # (B, T)
    return picked.masked_fill(padding.reshape(rows, length, *[1] * (values.ndim - 2)), 0), start


def check_ids(ids: Tensor, count: int, name: str, null: bool = False) -> None:
    """Refuse ids that are not int64 in [0, count), or ``count`` itself with `null`, the null condition.

    Raises:
        QLIPError: another type, or an id out of range.
    """
    if ids.dtype != torch.int64:
        raise QLIPError(f"{name} of type {ids.dtype}: must be int64; convert with .long()")
    if torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count + null:
        raise QLIPError(f"{name} {low if low < 0 else high} is out of range: 0 to {count - 1}")
