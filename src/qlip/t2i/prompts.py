"""Prompts as conditions: text or class names in, a `Condition` out, or one line that says why not.

A prompt that the decoder cannot have learned is refused, not drawn as something else: one that is empty, longer than
the prefix, in a script that its vocabulary has no letters of, or a class that it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from qlip.errors import QLIPError, nearest
from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.modeling.tokenizer import CLIPTokenizer

LENGTH, SHOWN = 60, 12
"""Characters of a prompt, and classes, in an error."""


class Prompts(Protocol):
    """Reads the prompts of one decoder."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Read prompts.

        Raises:
            QLIPError: a prompt that the decoder cannot draw; names it.
        """
        ...


class TokenPrompts:
    """Prompts as ids of a vocabulary, for decoders with ``condition: tokens``."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.tokenizer.get_vocab()
        decode = tokenizer.tokenizer.decode
        # a character of several bytes is known if a token, which was merged from training captions, holds it whole
        self.letters = {
            letter for one in known.values() for letter in decode([one]) if letter != "\N{REPLACEMENT CHARACTER}"
        }

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """See :class:`Prompts`."""
        for prompt in prompts:
            check_text(prompt)
            strange = sorted({letter for letter in prompt.lower() if not letter.isspace()} - self.letters)
            if strange:
                letters = " ".join(strange[:8])
                raise QLIPError(
                    f"prompt {shortened(prompt)}: the captions this drawer was trained on have no {letters};"
                    " write it in their language"
                )
            if self.tokenizer.tokenizer.encode(prompt).overflowing:
                raise QLIPError(
                    f"prompt {shortened(prompt)}: longer than the {self.tokenizer.length - 2} word pieces that this"
                    " drawer reads; shorten it"
                )
        return Condition(*self.tokenizer(list(prompts)))


class ClassPrompts:
    """Names of classes, for decoders with ``condition: class``; their numbers where the decoder has no names."""

    def __init__(self, config: DecoderConfig) -> None:
        count = config.condition_size
        self.names = list(config.classes or (str(number) for number in range(count)))

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """See :class:`Prompts`."""
        for prompt in prompts:
            if prompt not in self.names:
                raise unknown_class(prompt, self.names)
        return Condition(torch.tensor([self.names.index(prompt) for prompt in prompts], dtype=torch.int64))


def unknown_class(name: str, names: Sequence[str]) -> QLIPError:
    """The error for a class that a drawer does not have."""
    some = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return QLIPError(f"{name}: no such class{nearest(name, list(names))}; this drawer has {some}")


def check_text(prompt: object) -> None:
    """Refuse what is no text, and text without a letter.

    Raises:
        QLIPError: names the prompt.
    """
    if not isinstance(prompt, str):
        raise QLIPError(f"prompt {prompt!r:.40}: give a string")
    if not prompt.strip():
        raise QLIPError("an empty prompt: write what to draw, as 'a red circle'")


def shortened(prompt: str) -> str:
    """The prompt in quotes, of bounded length."""
    return repr(prompt if len(prompt) <= LENGTH else prompt[: LENGTH - 3] + "...")


def open_prompts(config: DecoderConfig, folder: Path, name: str) -> Prompts:
    """Return the reader of a decoder's prompts.

    Args:
        config: of the decoder.
        folder: with the vocabulary of its captions.
        name: of the decoder, for errors.

    Raises:
        QLIPError: the vocabulary is absent or of another size.
    """
    if config.condition == "class":
        return ClassPrompts(config)
    if config.condition == "tokens":
        tokenizer = CLIPTokenizer.from_folder(folder, config.prefix_length)
        if tokenizer is None:
            raise QLIPError(f"{name}: has no vocabulary of its captions (tokenizer.json); fetch the folder again")
        if tokenizer.vocab_size != config.condition_size:
            raise QLIPError(
                f"{name}: its vocabulary has {tokenizer.vocab_size} words and its config.json"
                f" {config.condition_size}; they belong to different decoders"
            )
        return TokenPrompts(tokenizer)
    raise QLIPError(f"{name}: reads features of text, and its config.json names no text encoder")
