"""Visual tokens as the sequences that language models read and write, and back: `SequenceLayout`.

Shapes: N tokens, K groups per token, G bits per group, S sub-tokens per sequence.

Ids of a :class:`SequenceLayout`, in a vocabulary of a language model that begins with `offset` ids of its own:

    offset ... offset + 2^G - 1     a group's value
    offset + 2^G                    begin of an image, if `begin`
    the one after                   end of an image, if `end`

Together `vocabulary_size` ids; the model's embedding needs `offset + vocabulary_size` rows. So 256 tokens of 28 bits in
groups of 14 are 512 sub-tokens of 16,384 values (arXiv 2502.05178).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.indices import MAX_GROUP_BITS, check_indices

GroupOrder = Literal["token", "group"]


@dataclass(frozen=True)
class SequenceLayout:
    """Order and ids of an image's indices in a sequence.

    Attributes:
        group_size: G.
        groups: K.
        order: ``token``, all groups of the first token in raster order, then of the next; or ``group``, the first group
            of all tokens, then the second of all.
        begin, end: put an id of its own before the image, and after it.
        offset: first id, within a larger vocabulary.
    """

    group_size: int
    groups: int
    order: GroupOrder = "token"
    begin: bool = False
    end: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        if self.order not in ("token", "group"):
            raise QLIPError(f"order {self.order!r}: need token or group")
        if self.groups < 1 or not 1 <= self.group_size < MAX_GROUP_BITS or self.offset < 0:
            raise QLIPError(
                f"{self.groups} groups of {self.group_size} bits from id {self.offset} on: need at least 1 group of "
                f"1 to {MAX_GROUP_BITS - 1} bits, and no negative id"
            )
        if self.offset + self.vocabulary_size > 2**63:
            raise QLIPError(f"offset {self.offset} and groups of {self.group_size} bits: ids beyond int64")

    @classmethod
    def for_bits(cls, bits_per_token: int, group_size: int, **options: Any) -> SequenceLayout:
        """Layout of tokens of a number of bits, cut into groups of `group_size`; options as the attributes.

        Raises:
            QLIPError: the groups do not divide the bits.
        """
        if group_size < 1 or bits_per_token % group_size:
            raise QLIPError(f"group_size {group_size} does not divide {bits_per_token} bits; choose a divisor")
        return cls(group_size, bits_per_token // group_size, **options)

    @property
    def values(self) -> int:
        """Number of group values, 2^G."""
        return 1 << self.group_size

    @property
    def vocabulary_size(self) -> int:
        """Number of ids: values, begin and end."""
        return self.values + self.begin + self.end

    @property
    def begin_id(self) -> int | None:
        """Id before an image, or None."""
        return self.offset + self.values if self.begin else None

    @property
    def end_id(self) -> int | None:
        """Id after an image, or None."""
        return self.offset + self.values + self.begin if self.end else None

    def length(self, num_tokens: int) -> int:
        """Sequence length S of an image of N tokens."""
        return num_tokens * self.groups + self.begin + self.end

    def to_sequence(self, indices: Tensor) -> Tensor:
        """Turn indices into ids.

        Args:
            indices: int64 (..., N, K).

        Returns:
            int64 (..., S).

        Raises:
            QLIPError: another number of groups, or an index out of range.
        """
        if indices.ndim < 2 or indices.shape[-1] != self.groups:
            raise QLIPError(f"indices of shape {tuple(indices.shape)}: need (..., N, {self.groups})")
        check_indices(indices, self.group_size)
        ids = (indices if self.order == "token" else indices.transpose(-1, -2)).flatten(-2) + self.offset
        marks = [ids.new_full((*ids.shape[:-1], 1), one) for one in (self.begin_id, self.end_id) if one is not None]
        return torch.cat([*marks[: self.begin], ids, *marks[self.begin :]], dim=-1)

    def special_mask(self, ids: Tensor) -> Tensor:
        """Return True where an id is begin or end, bool of the shape of `ids`; the other ids are group values."""
        return ids >= self.offset + self.values

    def to_indices(self, ids: Tensor) -> Tensor:
        """Turn ids into indices, the inverse of `to_sequence`.

        Args:
            ids: int64 (..., S).

        Returns:
            int64 (..., N, K).

        Raises:
            QLIPError: begin or end is missing, an id is no group's value, or the last token is incomplete.
        """
        for name, place, wanted in (("begin", 0, self.begin_id), ("end", -1, self.end_id)):
            if wanted is not None and (not ids.shape[-1] or (ids[..., place] != wanted).any()):
                raise QLIPError(f"a sequence without its {name} id, {wanted}, at its {name}")
        inside = ids[..., self.begin : ids.shape[-1] - self.end] - self.offset
        if inside.shape[-1] % self.groups:
            raise QLIPError(f"{inside.shape[-1]} sub-tokens are no whole number of tokens of {self.groups} groups")
        if inside.numel() and (int(inside.min()) < 0 or int(inside.max()) >= self.values):
            bad = int(inside[(inside < 0) | (inside >= self.values)][0]) + self.offset
            last = self.offset + self.values - 1
            raise QLIPError(f"id {bad} is no group's value: {self.offset} to {last}")
        shape = (-1, self.groups) if self.order == "token" else (self.groups, -1)
        found: Tensor = inside.unflatten(-1, shape)
        return found if self.order == "token" else found.transpose(-1, -2).contiguous()
