"""Continuation of text by a decoder, id by id: `complete`.

A sequence depends on its embeddings, the seed and its number alone, not on the batch. The cache may begin with what
several calls share, such as an image, and keeps what was said, for the next turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.lm.cache import KVCache
from qlip.lm.causal import CausalModel
from qlip.lm.sampling import Sampling, uniforms

ENDED = -1
"""Yielded for a sequence that has ended."""


@torch.inference_mode()
def complete(
    model: CausalModel,
    embeddings: Tensor,
    start: Tensor | None = None,
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Draw ids one after the other, and yield each as soon as it is drawn.

    Args:
        model: in eval mode; on a CPU `qlip.lm.pack` makes it faster.
        embeddings: (B, T, D), what is to be continued, behind what the cache holds.
        start: (B,) int64, first position in ``embeddings`` that is no padding; None is no padding.
        max_tokens: ids per sequence; there are fewer where the model's context or a given cache ends.
        stop: ids that end a sequence; they are yielded.
        sampling: temperature and filters; the likeliest id by default.
        seed: of the noise.
        numbers: numbers of the sequences, which choose their noise; 0, 1, ... by default.
        cache: of B rows; a new one by default. It holds ``embeddings`` and all yielded ids but the last: the next turn
            begins with the embedding of that.

    Yields:
        (B,) int64, -1 for sequences that have ended; no more when all have.

    Raises:
        QLIPError: a model in training mode, nothing to continue, a context or a cache that is too short, or logits that
            are not finite.
    """
    check_integer("max_tokens", max_tokens)
    rows, steps = embeddings.shape[:2]
    if model.training:
        raise QLIPError("the language model is in training mode; call model.eval() first")
    if not rows or not steps or (start is not None and bool((start >= steps).any())):
        raise QLIPError("nothing to continue: give each sequence one position or more")
    if cache is None:
        cache = model.new_cache(rows, min(steps + max_tokens - 1, model.config.length))
    room = min(max_tokens, min(cache.capacity, model.config.length) - cache.length - steps + 1)  # the last needs none
    sampling = sampling or Sampling(temperature=0.0)
    numbers = range(rows) if numbers is None else numbers
    if len(numbers) != rows:
        raise QLIPError(f"{len(numbers)} numbers for {rows} sequences; give one per sequence")
    noise = uniforms(seed, numbers, max_tokens, 1)[..., 0].to(model.device)  # (B, max_tokens)
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=model.device)
    documents = None
    if start is not None:
        documents = -(torch.arange(steps, device=model.device) < start.to(model.device)[:, None]).long()  # (B, T)

    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    hidden = model.hidden(embeddings, documents=documents, cache=cache)
    for step in range(room):
        logits = model.logits(hidden[:, -1])  # (B, V)
        drawn = sampling.draw(logits.float(), noise[:, step])
        yield drawn.masked_fill(ended, ENDED)
        ended |= torch.isin(drawn, ends)
        if step + 1 == room or bool(ended.all()):
            return
        hidden = model.hidden(model.embed(drawn)[:, None], cache=cache)
