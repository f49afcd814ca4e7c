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


class Steps:
    """How an id is drawn from states, and what the model reads next; subclasses change either.

    Attributes:
        branches: rows of the model per sequence: 2 where guidance adds a row for each, behind all sequences.
    """

    branches = 1

    def __init__(self, model: CausalModel, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling

    def draw(self, hidden: Tensor, noise: Tensor, left: int) -> Tensor:
        """Draw an id per sequence.

        Args:
            hidden: (R, D), states that predict it; R is B times the branches.
            noise: (B,) float64 in [0, 1).
            left: ids that can still be drawn, with this one.

        Returns:
            (B,) int64.
        """
        return self.sampling.draw(self.model.logits(hidden).float(), noise)

    def embed(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Embed drawn ids (B,) as what the model reads next, (R, 1, D), behind what the cache holds."""
        return self.model.embed(ids)[:, None]


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
    how: Steps | None = None,
) -> Iterator[Tensor]:
    """Draw ids one after the other, and yield each as soon as it is drawn.

    Args:
        model: in eval mode; on a CPU `qlip.lm.pack` makes it faster.
        embeddings: (R, T, D), what is to be continued, behind what the cache holds; R is B times the branches.
        start: (R,) int64, first position in ``embeddings`` that is no padding; None is no padding.
        max_tokens: ids per sequence; there are fewer where the model's context or a given cache ends.
        stop: ids that end a sequence; they are yielded.
        sampling: temperature and filters; the likeliest id by default.
        seed: of the noise.
        numbers: numbers of the sequences, which choose their noise; 0, 1, ... by default.
        cache: of R rows; a new one by default. It holds ``embeddings`` and all yielded ids but the last: the next turn
            begins with the embedding of that.
        how: what is drawn from states and read next, in place of ``sampling`` from all ids.

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
    how = how or Steps(model, sampling or Sampling(temperature=0.0))
    sequences = rows // how.branches
    numbers = range(sequences) if numbers is None else numbers
    if len(numbers) != sequences:
        raise QLIPError(f"{len(numbers)} numbers for {sequences} sequences; give one per sequence")
    noise = uniforms(seed, numbers, max_tokens, 1)[..., 0].to(model.device)  # (B, max_tokens)
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=model.device)
    documents = None
    if start is not None:
        documents = -(torch.arange(steps, device=model.device) < start.to(model.device)[:, None]).long()  # (B, T)

    ended = torch.zeros(sequences, dtype=torch.bool, device=model.device)
    hidden = model.hidden(embeddings, documents=documents, cache=cache)
    for step in range(room):
        drawn = how.draw(hidden[:, -1], noise[:, step], room - step)
        yield drawn.masked_fill(ended, ENDED)
        ended |= torch.isin(drawn, ends)
        if step + 1 == room or bool(ended.all()):
            return
        hidden = model.hidden(how.embed(drawn, cache), cache=cache)
