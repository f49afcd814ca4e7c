"""Figures of a batch by kind of document: nats per token, bits per byte, nats per word of a caption, bits per image.

Of a batch, `Measures.counts` says how many targets, bytes and words there are, `Measures.sums` sums their nats, and
`Measures.figures` divides, once both are those of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlip.training.task import Report
from qlip.um3.batch import KINDS, UM3Batch
from qlip.um3.config import UM3Config
from qlip.um3.sequence import TEXT, VISUAL, Grammar

NAMES = {
    "text": ("text", "text_image_bits"),
    "image-to-text": ("caption", "described_image_bits"),
    "text-to-image": ("prompt", "image_bits"),
    "interleaved": ("interleaved_text", "interleaved_image_bits"),
}
"""Names of a kind's nats per text target and bits per image."""
MODALITIES = ("text", "visual", "end")
"""Kinds of targets; the end of an image is no choice."""
PARTS = tuple((kind, modality) for kind in KINDS for modality in MODALITIES)


class Measures:
    """Counts, sums and figures of batches.

    Args:
        config: of the model.
        texts: text of each text id in UTF-8; see :meth:`qlip.lm.tokenizer.LLMTokenizer.token_texts`.
    """

    def __init__(self, config: UM3Config, texts: Sequence[bytes]) -> None:
        self.config, self.grammar = config, Grammar(config)
        self._texts = [*texts, *[b""] * (config.decoder.vocab_size - len(texts))]
        self._tables: tuple[Tensor, Tensor] | None = None

    def counts(self, batch: UM3Batch) -> dict[str, int]:
        """Number of targets of each kind and modality; bytes of texts, and words of captions, that are targets.

        Tokens that did not fit into the rows are "dropped".
        """
        masks = self._masks(batch)
        sizes, spaced = self._of_ids(batch.ids.device)
        size, begins = sizes[batch.ids], spaced[batch.ids]
        begins[:, 1:] |= batch.ids[:, :-1] == self.config.end_image
        found = {name: mask.sum() for name, mask in masks.items()}
        found["bytes"] = (size * masks["text/text"]).sum()
        found["words"] = (begins & (size > 0) & masks["image-to-text/text"]).sum()
        found["dropped"] = batch.dropped.sum()
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))  # the GPU is waited for once

    def sums(self, batch: UM3Batch, nats: Tensor) -> dict[str, Tensor]:
        """Summed nats of each kind and modality; `nats` is (B, T) at the places of targets."""
        return {name: (nats * mask).sum() for name, mask in self._masks(batch).items()}

    def figures(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Report:
        """Named figures of those kinds that the batch has."""
        found: Report = {}
        for kind in KINDS:
            text, image = NAMES[kind]
            if count := counts[f"{kind}/text"]:
                found[text] = sums[f"{kind}/text"] / count
            if count := counts[f"{kind}/visual"]:
                found[image] = sums[f"{kind}/visual"] * (self.config.image_length / count / math.log(2))
        if counts["bytes"]:
            found["text_bits_per_byte"] = sums["text/text"] / (counts["bytes"] * math.log(2))
        if counts["words"]:
            found["caption_per_word"] = sums["image-to-text/text"] / counts["words"]
        return {name: one.detach() for name, one in found.items()}

    def _masks(self, batch: UM3Batch) -> dict[str, Tensor]:
        """Targets of each kind and modality, bool (B, T)."""
        types = self.grammar.target_types(batch.ids, batch.documents)
        end = batch.ids == self.config.end_image
        modality = {"text": (types == TEXT) & ~end, "visual": types >= VISUAL, "end": (types == TEXT) & end}
        return {f"{kind}/{one}": modality[one] & (batch.kinds == KINDS.index(kind)) for kind, one in PARTS}

    def _of_ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of bytes of each id, and whether it begins with a space, (V,); made once per device."""
        if self._tables is None or self._tables[0].device != device:
            sizes = torch.tensor([len(one) for one in self._texts], device=device)
            self._tables = sizes, torch.tensor([one[:1].isspace() for one in self._texts], device=device)
        return self._tables
