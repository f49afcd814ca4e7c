"""Prompts as conditions: text or class names in, a `Condition` out, or one line that says why not.

A prompt that the decoder cannot have learned is refused, not drawn as something else: one that is empty, longer than
the prefix, in a script that its vocabulary has no letters of, or a class that it does not have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlip.errors import QLIPError, QLIPWarning, nearest
from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.lm.model import DecoderModel
from qlip.lm.text_encoders import TextEncoder, open_text_encoder
from qlip.lm.text_encoders.encoders import FORMS
from qlip.modeling.tokenizer import CLIPTokenizer

LENGTH, SHOWN = 60, 12
"""Characters of a prompt, and classes, in an error."""


class Prompts(Protocol):
    """Reads the prompts of one decoder."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Read prompts.

        Raises:
            QLIPError: as `check`.
        """
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the decoder cannot draw; costs little.

        Raises:
            QLIPError: names the first one.
        """
        ...


class TextPrompts:
    """Prompts as ids of a vocabulary, or as features of a text encoder.

    Args:
        read: B texts to ids (B, T) or features (B, T, C), and their mask (B, T).
        source: knows which texts `read` cannot read.
        cut: warn of a long prompt, whose end is not read, instead of refusing it.
    """

    def __init__(
        self,
        read: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        source: CLIPTokenizer | TextEncoder,
        cut: bool = False,
    ) -> None:
        self.read, self.source, self.cut = read, source, cut

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """See :class:`Prompts`."""
        self.check(prompts)
        return Condition(*self.read(list(prompts)))

    def check(self, prompts: Sequence[str]) -> None:
        """See :class:`Prompts`."""
        for prompt in prompts:
            check_text(prompt)
            if fault := self.source.unread(prompt, self.cut):
                raise QLIPError(f"prompt {shortened(prompt)}: {fault}")
            if self.cut and self.source.unread(prompt):
                warnings.warn(
                    f"prompt {shortened(prompt)}: longer than what is read; its end has no effect",
                    QLIPWarning,
                    stacklevel=2,
                )


class ClassPrompts:
    """Names of classes, for decoders with ``condition: class``; their numbers where the decoder has no names."""

    def __init__(self, config: DecoderConfig) -> None:
        count = config.condition_size
        self.names = list(config.classes or (str(number) for number in range(count)))

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """See :class:`Prompts`."""
        self.check(prompts)
        return Condition(torch.tensor([self.names.index(prompt) for prompt in prompts], dtype=torch.int64))

    def check(self, prompts: Sequence[str]) -> None:
        """See :class:`Prompts`."""
        for prompt in prompts:
            if prompt not in self.names:
                raise unknown_class(prompt, self.names)


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


def open_prompts(decoder: DecoderModel, folder: Path, name: str) -> Prompts:
    """Return the reader of a decoder's prompts.

    Args:
        decoder: a text encoder is put on its device.
        folder: with the vocabulary of its captions.
        name: of the decoder, for errors.

    Raises:
        QLIPError: the vocabulary is absent or of another size; no text encoder, or another one.
    """
    config = decoder.config
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
        return TextPrompts(tokenizer, tokenizer)
    if config.text_encoder is None:
        forms = ", ".join(FORMS)
        raise QLIPError(
            f"{name}: reads features of text, and its config.json names no text encoder; add text_encoder ({forms})"
        )
    encoder = open_text_encoder(config.text_encoder, decoder.device)
    decoder.check_text_encoder(encoder.fingerprint, encoder.name)
    if (encoder.size, encoder.length) != (config.condition_size, config.prefix_length):
        raise QLIPError(
            f"{encoder.name}: {encoder.length} positions of {encoder.size} features, but {name} reads"
            f" {config.prefix_length} of {config.condition_size}; use the encoder that it was trained with"
        )
    return TextPrompts(encoder.features, encoder, cut=True)  # as LlamaGen does
