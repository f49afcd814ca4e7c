"""Basis of text encoders: the protocol `TextEncoder`, and `TransformerTextEncoder`.

Shapes: B texts, T positions, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.lm.conditions import Condition, left_padded
from qlip.runtime.finite import require_finite

AT_ONCE = 64
"""Texts that an encoder reads at once."""

TextFeatures = tuple[Tensor, Tensor]
"""float32 (B, T, C) features on the CPU, and their mask, bool (B, T), True at real positions, which come last."""


class TextEncoder(Protocol):
    """Turns texts into features per token.

    Attributes:
        name: what `open_text_encoder` opens.
        size: C.
        length: T; longer texts are cut.
        fingerprint: SHA-256 (hex) of all that decides about features: weights, tokenizer, cleaning, length.
    """

    name: str
    size: int
    length: int
    fingerprint: str

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts; the features of a text do not depend on the others.

        Args:
            texts: B strings.

        Returns:
            float32 (B, T, C) features, zero at padding, and their mask, bool (B, T); on the CPU. The real positions
            come last.

        Raises:
            QLIPError: not a list of strings, or features that are not finite.
        """
        ...

    def unread(self, text: str, cut: bool = False) -> str | None:
        """Why a text, or a part of it, does not reach the features, such as "longer than ..."; None if all does.

        Args:
            text: one text.
            cut: the end of a long text may be cut off.
        """
        ...


class TextTokenizer(Protocol):
    """Turns texts into ids and a mask, int64 (B, T) each, as `CLIPTokenizer`."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read B texts."""
        ...

    def unread(self, text: str, cut: bool = False) -> str | None:
        """See :class:`TextEncoder`."""
        ...


class TransformerTextEncoder:
    """States of a transformer's last layer, after its last norm.

    Args:
        name: see `TextEncoder`.
        model: ids and ``attention_mask`` to an output with ``last_hidden_state`` (B, T, C); in eval mode.
        tokenizer: of the model.
        size: C.
        length: T.
        fingerprint: see `TextEncoder`.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: TextTokenizer, size: int, length: int, fingerprint: str
    ) -> None:
        self.name, self.size, self.length, self.fingerprint = name, size, length, fingerprint
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> TextFeatures:
        """See :class:`TextEncoder`."""
        check_texts(texts)
        values = torch.zeros(len(texts), self.length, self.size)
        masks = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for start in range(0, len(texts), AT_ONCE):
            block = slice(start, start + AT_ONCE)
            ids, mask = self.tokenizer(texts[block])
            output = self.model(ids.to(self.device), attention_mask=mask.to(self.device))
            values[block], masks[block] = aligned(output.last_hidden_state.float().cpu(), mask)
        require_finite(
            values, "features", f"the output of {self.name} is broken", [f"text {one[:80]!r}" for one in texts]
        )
        return values, masks

    def unread(self, text: str, cut: bool = False) -> str | None:
        """See :class:`TextEncoder`."""
        return self.tokenizer.unread(text, cut)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse anything but a list of strings."""
    if isinstance(texts, str):
        raise QLIPError("features takes a list of texts; write [text] for one")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise QLIPError(f"text {number} is {text!r:.40}, not a string")


def aligned(values: Tensor, mask: Tensor) -> TextFeatures:
    """Move real positions to the end; (B, T, C) features and their mask (B, T)."""
    length = values.shape[1]
    moved, start = left_padded(Condition(values, mask), length)
    if start is None:
        return moved, torch.ones(values.shape[:2], dtype=torch.bool)
    return moved, torch.arange(length) >= start[:, None]
