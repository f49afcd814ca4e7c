"""Prompts and answers as text of a conversation: `prompt_of` gives ids to answer, `AnswerText` the answer's characters.

The ids of a prompt are those that training has of the same turns, because the same code makes them.
"""

from __future__ import annotations

from dataclasses import replace

from qlip.errors import QLIPError
from qlip.lm.tokenizer import LLMTokenizer
from qlip.vlm.config import IGNORED
from qlip.vlm.conversations import Conversation, Turn
from qlip.vlm.labels import encode_conversation
from qlip.vlm.templates import Template

NO_LIMIT = 1 << 40
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoded text of the first bytes of a character whose last ones are still missing."""


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


class AnswerText:
    """Text of an answer whose ids come one after the other, in whole characters.

    A tokenizer of bytes gives a character in several ids; the text waits for the last of them.

    Args:
        tokenizer: decodes the ids.
        end: text that ends the answer; "" for none.

    Attributes:
        ended: the end was read.
    """

    def __init__(self, tokenizer: LLMTokenizer, end: str = "") -> None:
        self._tokenizer, self._end = tokenizer, end
        self._ids: list[int] = []
        self._given = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add an id, and return the text that is whole now and was not given before; it may be empty."""
        self._ids.append(token)
        return self._new(self._tokenizer.decode(self._ids).rstrip(UNFINISHED))

    def rest(self) -> str:
        """Return what is left when no further id comes; bytes that are no character become U+FFFD."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        if self._end and self._end in text:
            text, self.ended = text.partition(self._end)[0], True
        text = text.strip()  # spaces between a template's marks and the answer; later ones are given with what follows
        if not text.startswith(self._given):  # a tokenizer that rewrites what it gave
            return ""
        new, self._given = text[len(self._given) :], text
        return new
