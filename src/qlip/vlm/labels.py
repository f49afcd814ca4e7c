"""Ids and labels of conversations, made piece by piece, so that no label depends on how a tokenizer splits text.

Neighbouring pieces of text that agree about the loss are encoded as one text; their ids, those of control tokens and
the places of images are joined. Nothing is encoded twice, counted or searched for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm.tokenizer import LLMTokenizer
from qlip.vlm.config import IGNORED, IMAGE_ID
from qlip.vlm.conversations import Conversation
from qlip.vlm.templates import Piece, Template, token_of


@dataclass(frozen=True)
class Example:
    """A conversation of T tokens.

    Attributes:
        ids: int64 (T,), `IMAGE_ID` at image tokens.
        labels: int64 (T,), not shifted; `IGNORED` where there is no loss. The last one is not ignored.
        num_images: in `ids`, the first ones of the conversation.
        cut: labels that did not fit.
    """

    ids: Tensor
    labels: Tensor
    num_images: int
    cut: int = 0


def encode_conversation(
    conversation: Conversation, template: Template, tokenizer: LLMTokenizer, image_length: int, max_length: int
) -> Example:
    """Turn a conversation into ids and labels; what stands behind the last label is left out, as nothing reads it.

    Args:
        conversation: of users and assistants.
        template: of the language model.
        tokenizer: of the language model.
        image_length: tokens per image, N.
        max_length: greatest number of tokens; an image that does not fit whole is left out, with all behind it.

    Raises:
        QLIPError: no label is left, more or fewer marks than images, or a control token that the tokenizer lacks.
    """
    ids, labels = list[int](), list[int]()
    image_ends = list[int]()
    after_token = False
    for piece in _joined(template.pieces(conversation)):
        if piece.kind == "image":
            new = [IMAGE_ID] * image_length
            image_ends.append(len(ids) + image_length)
        elif piece.kind == "token":
            token = token_of(piece.text, tokenizer)
            new = [] if token is None else [token]
        else:
            first = not ids or ids == [tokenizer.bos]
            ends = piece.trained and piece.text.isspace()  # plain's end alone, which has the same ids everywhere
            new = tokenizer.encode(piece.text, first=first and not ends, after_token=after_token and not ends)
        after_token = piece.kind != "text"
        ids += new
        labels += new if piece.trained else [IGNORED] * len(new)
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    if not places:
        raise QLIPError(f"{conversation.id}: has no answer to learn from")
    limit = min([max_length, *(end - image_length for end in image_ends if end > max_length)])
    kept = [place for place in places if place < limit]
    if not kept:
        images = f", {len(image_ends)} images of {image_length} among them" if image_ends else ""
        raise QLIPError(
            f"{conversation.id}: no label fits in max_length {max_length}: its first answer begins behind"
            f" {places[0]} tokens{images}"
        )
    length = kept[-1] + 1
    return Example(
        torch.tensor(ids[:length]),
        torch.tensor(labels[:length]),
        sum(end <= length for end in image_ends),
        len(places) - len(kept),
    )


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Join neighbouring pieces of text that agree about the loss."""
    for (kind, trained), group in itertools.groupby(pieces, key=lambda piece: (piece.kind, piece.trained)):
        if kind == "text":
            yield Piece(kind, "".join(piece.text for piece in group), trained)
        else:
            yield from group
