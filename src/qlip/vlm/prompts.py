"""Prompts: `prompt_of` gives the ids that are to be answered, which are those that training has of the same turns."""

from __future__ import annotations

from dataclasses import replace

from qlip.errors import QLIPError
from qlip.lm.tokenizer import LLMTokenizer
from qlip.vlm.config import IGNORED
from qlip.vlm.conversations import Conversation, Turn
from qlip.vlm.labels import encode_conversation
from qlip.vlm.templates import Template

NO_LIMIT = 1 << 40


def prompt_of(conversation: Conversation, template: Template, tokenizer: LLMTokenizer, image_length: int) -> list[int]:
    """Encode a conversation up to the answer to its last turn.

    Args:
        conversation: ends with a user's turn.
        template, tokenizer, image_length: see :func:`encode_conversation`.

    Returns:
        Ids, `IMAGE_ID` at image tokens.

    Raises:
        QLIPError: the last turn is not the user's, or see :func:`encode_conversation`.
    """
    if not conversation.turns or conversation.turns[-1].role != "user":
        raise QLIPError(f"{conversation.id}: has no question; end with a turn of the user")
    answered = replace(conversation, turns=(*conversation.turns, Turn("assistant", "")))
    example = encode_conversation(answered, template, tokenizer, image_length, NO_LIMIT)
    begin, _ = last_labels(example.labels.tolist())
    return list(example.ids[:begin].tolist())


def last_labels(labels: list[int]) -> tuple[int, int]:
    """Begin and end of the last run of labels that are not ignored, which are the last answer's."""
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    begin = end
    while begin and labels[begin - 1] != IGNORED:
        begin -= 1
    return begin, end
