"""Bits per byte of held-out texts: the length of a document when the model codes it, divided by its bytes.

It does not depend on the vocabulary, so models with different tokenizers compare. Every byte counts, and every id is
predicted once: a document longer than a window is read in overlapping windows, and each of them scores what those
before did not reach. The end of a document is not scored. Where the tokenizer has no BOS, nothing predicts the first
id, and it costs as much as if all ids of text were equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.tokenizer import LLMTokenizer
from qlip.um3.model import UM3, um3_nats
from qlip.um3.sequence import TEXT

WINDOW = 1024
"""Ids per window, unless the model's context is shorter."""
AT_ONCE = 8192
"""Ids per batch, about."""


@dataclass(frozen=True)
class TextFigures:
    """Code length of documents.

    Attributes:
        num_documents: that were read.
        num_bytes: of their texts in UTF-8.
        num_ids: of their texts, without BOS.
        bits: of all ids.
        first_bits: part of `bits` for first ids that nothing predicts; 0 with a BOS.
    """

    num_documents: int
    num_bytes: int
    num_ids: int
    bits: float
    first_bits: float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.bits / self.num_bytes


@dataclass(frozen=True)
class _Window:
    """Ids of a window, int64 (S,), of which those from `first` on are scored."""

    ids: Tensor
    first: int


@torch.inference_mode()
def measure_texts(
    model: CausalModel | UM3,
    tokenizer: LLMTokenizer,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
) -> TextFigures:
    """Measure how many bits a model needs for texts.

    Args:
        model: decoder of text, or of text and images, whose text rows alone count under the separate softmax (eq. 6).
        tokenizer: of the model.
        texts: documents; empty ones are left out.
        window: ids per window; by default 1,024, or the model's context if that is shorter.
        stride: new ids per further window of a document; by default half a window. A smaller one gives each id more
            context, for more time.

    Raises:
        QLIPError: no text, a window longer than the model's context, or a stride that leaves a window no context.
    """
    decoder = model.decoder if isinstance(model, UM3) else model
    window = min(WINDOW, decoder.config.length) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= decoder.config.length:
        raise QLIPError(f"window {window:,}: need 2 to {decoder.config.length:,}, the model's context")
    if not 1 <= stride < window:
        raise QLIPError(f"stride {stride:,}: need 1 to {window - 1:,}, so that an id of the window before is read")
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    documents, num_bytes = list[Tensor](), 0
    for text in texts:
        if text:
            documents.append(torch.tensor(first + tokenizer.encode(text, first=True)))
            num_bytes += len(text.encode("utf-8", "surrogatepass"))
    if not documents:
        raise QLIPError("there is no text to measure; give at least one document that is not empty")
    nats = sum(
        _nats(model, batch) for batch in _batches([one for ids in documents for one in _windows(ids, window, stride)])
    )
    num_rows = model.config.text_vocab_size if isinstance(model, UM3) else decoder.config.vocab_size
    first_bits = 0.0 if first else len(documents) * math.log2(num_rows)
    num_ids = sum(map(len, documents)) - len(first) * len(documents)
    return TextFigures(len(documents), num_bytes, num_ids, nats / math.log(2) + first_bits, first_bits)


def _windows(ids: Tensor, window: int, stride: int) -> Iterator[_Window]:
    """Windows of a document, which score every id but the first once."""
    begin, scored = 0, 1
    while scored < len(ids):
        yield _Window(ids[begin : begin + window], scored - begin)
        begin, scored = begin + stride, begin + window


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Iterate over windows of about the same length, `AT_ONCE` ids at a time."""
    ordered = sorted(windows, key=lambda one: len(one.ids), reverse=True)
    place = 0
    while place < len(ordered):
        rows = max(1, AT_ONCE // len(ordered[place].ids))
        yield ordered[place : place + rows]
        place += rows


def _nats(model: CausalModel | UM3, batch: Sequence[_Window]) -> float:
    """Summed negative log-likelihood of the scored ids of windows."""
    decoder = model.decoder if isinstance(model, UM3) else model
    rows = [one.ids for one in batch]
    ids = pad_sequence(rows, batch_first=True).to(decoder.device)  # (B, T)
    documents = pad_sequence([torch.zeros_like(one) for one in rows], batch_first=True, padding_value=-1).to(ids.device)
    places = [torch.arange(one.first, len(one.ids)) + row * ids.shape[1] for row, one in enumerate(batch)]
    target_places = torch.cat(places).to(ids.device)  # (M,) in the flat batch
    hidden = decoder.hidden(decoder.embed(ids), documents=documents).flatten(0, 1)[target_places - 1]  # (M, D)
    targets = ids.flatten()[target_places]
    if isinstance(model, UM3):
        types = torch.full_like(targets, TEXT)
        nats = um3_nats(hidden, decoder.output_weight, targets, types, model.config)[0]
    else:
        nats = decoder.nats(hidden, targets)
    return float(nats.double().sum())
