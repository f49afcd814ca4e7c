"""Sequences of text and images: ids of an image, and the `Grammar` that says which id may follow which.

    text ... <boi> value of group 0 of token 0, of group 1, ..., of group K-1 of token N-1 <eoi> text ...

A state is an integer: `IN_TEXT`, or the number of an image's ids that were read, 0 behind its begin. Behind all N K of
them its end is forced. Training, generation and the tests of data all ask this one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.indices import check_indices
from qlip.um3.config import UM3Config

TEXT_TOKENS = 256
"""Ids of text, where a call names no number of ids."""
IN_TEXT = -1
"""State outside images."""
IGNORED, TEXT, VISUAL = -1, 0, 1
"""Types of targets: no loss, a text id, and a value of group k as `VISUAL` + k."""


def image_ids(config: UM3Config, indices: Tensor) -> Tensor:
    """Ids of images, token by token and group by group, without begin and end.

    Args:
        config: of the model.
        indices: int64 (..., N, K).

    Returns:
        int64 (..., N K).

    Raises:
        QLIPError: another number of tokens or groups, or an index out of range.
    """
    if indices.shape[-2:] != (config.num_tokens, config.num_groups):
        raise QLIPError(
            f"indices of shape {tuple(indices.shape)}: need (..., {config.num_tokens}, {config.num_groups}), the"
            f" tokens of an image of {config.grid[0]} x {config.grid[1]}"
        )
    check_indices(indices, config.group_size)
    return (indices + first_ids(config, indices.device)).flatten(-2)


def whole_image(config: UM3Config, indices: Tensor) -> Tensor:
    """Ids of an image with its begin and end, int64 (N K + 2,), of its indices, int64 (N, K); see `image_ids`."""
    begin, end = indices.new_tensor([config.begin_image]), indices.new_tensor([config.end_image])
    return torch.cat([begin, image_ids(config, indices), end])


def indices_of(config: UM3Config, ids: Tensor) -> Tensor:
    """Indices of images from their ids: the inverse of `image_ids`.

    Args:
        config: of the model.
        ids: int64 (..., N K), without begin and end.

    Returns:
        int64 (..., N, K).

    Raises:
        QLIPError: another number of ids, or an id that is no value of its group.
    """
    if not ids.ndim or ids.shape[-1] != config.image_length:
        raise QLIPError(f"ids of shape {tuple(ids.shape)}: an image has {config.image_length:,} ids")
    indices: Tensor = ids.unflatten(-1, (config.num_tokens, config.num_groups)) - first_ids(config, ids.device)
    wrong = ((indices < 0) | (indices >= 1 << config.group_size)).flatten(-2)
    if wrong.any():
        place = int(wrong.reshape(-1, config.image_length).any(0).nonzero()[0, 0])
        raise QLIPError(
            f"id {int(ids[..., place][wrong[..., place]][0])} at place {place} of an image is no value of its group"
        )
    return indices


def first_ids(config: UM3Config, device: torch.device) -> Tensor:
    """First id of each group, (K,)."""
    return torch.tensor([config.group_rows(group)[0] for group in range(config.num_groups)], device=device)


@dataclass(frozen=True)
class AllowedIds:
    """Ids that may follow: neighbouring rows of the vocabulary without some of them.

    Attributes:
        begin, end: first id, and the one behind the last.
        without: ids among them that may not follow.
    """

    begin: int
    end: int
    without: tuple[int, ...] = ()

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, int) and self.begin <= id_ < self.end and id_ not in self.without

    def ids(self) -> list[int]:
        """All of them, ascending."""
        return [one for one in range(self.begin, self.end) if one not in self.without]


class Grammar:
    """Which ids may follow which.

    Args:
        config: of the model.
    """

    def __init__(self, config: UM3Config) -> None:
        self.config = config
        self.image_cost = config.image_length + 2
        """Ids of an image with its begin and end."""

    # ---------------------------------------------------------------- one sequence

    def start(self) -> int:
        """State before the first id."""
        return IN_TEXT

    def advance(self, state: int, id_: int) -> int:
        """State behind an id.

        Raises:
            QLIPError: the id may not follow.
        """
        if id_ not in self.allowed(state):
            raise QLIPError(self._fault(state, id_))
        if state == IN_TEXT:
            return 0 if id_ == self.config.begin_image else IN_TEXT
        return IN_TEXT if state == self.config.image_length else state + 1

    def behind(self, ids: Sequence[int], where: str = "") -> int:
        """State behind the ids of a document so far.

        Args:
            ids: from its first on.
            where: beginning of the error.

        Raises:
            QLIPError: an id may not stand where it does; with the place and the fault.
        """
        state = self.start()
        for place, id_ in enumerate(ids):
            try:
                state = self.advance(state, id_)
            except QLIPError as error:
                raise QLIPError(f"{where}position {place}: {error}") from None
        return state

    def allowed(self, state: int, budget: int | None = None) -> AllowedIds:
        """Ids that may follow.

        Args:
            state: before them.
            budget: ids that can still follow, this one among them; no image is begun that would not fit, with its end.
                None is any number.
        """
        config = self.config
        if state == IN_TEXT:
            fits = budget is None or budget >= self.image_cost
            without = (config.end_image,) if fits else (config.begin_image, config.end_image)
            return AllowedIds(0, config.text_vocab_size, without)
        if state == config.image_length:
            return AllowedIds(config.end_image, config.end_image + 1)
        return AllowedIds(*config.group_rows(state % config.num_groups))

    def check(self, ids: Tensor) -> None:
        """Refuse a document that is not text and whole images.

        Args:
            ids: int64 (T,).

        Raises:
            QLIPError: with the place and the fault.
        """
        if (state := self.behind(ids.tolist())) != IN_TEXT:
            raise QLIPError(f"position {len(ids)}: the document ends inside an image: {self._progress(state)}")

    def _progress(self, state: int) -> str:
        return f"{state:,} of its {self.config.image_length:,} ids, and no end"

    def _fault(self, state: int, id_: int) -> str:
        config = self.config
        if not 0 <= id_ < config.decoder.vocab_size:
            return (
                f"id {id_} is none of the {config.decoder.vocab_size:,}; does the data belong to another tokenizer or"
                " another model?"
            )
        if state == IN_TEXT:
            what = "an image's end" if id_ == config.end_image else "a visual id"
            return f"id {id_}, {what}, stands outside an image"
        if state == config.image_length:
            return f"id {id_} stands behind a whole image, where its end, {config.end_image}, is due"
        if id_ < config.text_vocab_size:
            return f"id {id_}, one of text, cuts an image short: {self._progress(state)}"
        return f"id {id_} is no value of group {state % config.num_groups}, which is due"

    # ---------------------------------------------------------------- batches

    def target_types(self, ids: Tensor, documents: Tensor) -> Tensor:
        """Types of targets, each at the place of the target; the first id of a document is no target.

        Args:
            ids: int64 (B, T) of checked documents.
            documents: int64 (B, T), number of the document in its row; -1 at padding.

        Returns:
            int64 (B, T): `IGNORED`, `TEXT`, or `VISUAL` + k for group k.
        """
        visual = ids >= self.config.visual_begin
        groups = (visual.cumsum(1) - 1) % self.config.num_groups  # images are whole, so each has whole tokens
        types = torch.where(visual, VISUAL + groups, TEXT)
        inside = torch.zeros_like(visual)
        inside[:, 1:] = documents[:, 1:] == documents[:, :-1]
        return types.masked_fill(~inside | (documents < 0), IGNORED)
