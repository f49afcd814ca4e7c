"""Speculative Jacobi decoding (arXiv 2410.01699): several ids per pass of the model, with the exact distribution.

Each pass runs the model on a draft of the next ids of a sequence, which gives the probabilities p of every position
given the draft before it. A draft id x was drawn from probabilities q that are known, those of the pass before. From
the first position on, x is accepted with probability min(1, p(x) / q(x)); the first id that is refused is drawn again
in proportion to max(0, p - q), which makes its distribution exactly p (speculative sampling, arXiv 2211.17192). If the
whole draft is accepted, one more id is drawn from its p. What follows is drawn afresh, each position from its p of this
pass, or the last p if it has none, and is the next draft. So a pass settles one id or more.

The distribution is exact since every pass draws all unaccepted ids afresh: given the passes before, draft ids are
independent draws from their q. Keeping likely ids of the draft instead, as SJD++ (arXiv 2512.07503) does, is faster
but not covered by this argument.

Shapes: B sequences, S ids of each, W draft ids, V values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlip.errors import check_integer
from qlip.lm.sampling import draw_from, uniforms

ProbabilitiesOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""One pass of the model, from `ids`, `lengths` and `draft` to probabilities.

ids: (B, S) int64, of which the first ``lengths`` are settled.
lengths: (B,) int64, 0 in the first pass. From pass to pass they grow by 1 to W + 1: by ids of the draft, whose cache
    entries stay valid, and a last id that the model has not read yet.
draft: (B, W) int64, ids that follow the settled ones; W is 0 in the first pass.
Returns (B, W + 1, V) float: row i is for position lengths + i, given the settled ids and draft[:, :i]. Temperature,
    filters and guidance are in it. Rows of positions at or beyond S are not read.
"""


def decode(
    probabilities_of: ProbabilitiesOf, length: int, window: int, seed: int, numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Draw sequences as ancestral sampling would, in fewer passes of the model.

    A sequence depends on the model, the seed, its number and the window alone, not on the batch: draws of pass r have
    the noise of rounds 2r (acceptance) and 2r + 1 (ids) of :func:`qlip.lm.sampling.uniforms`. The ids differ from those
    of sampling one by one, which reads other noise; their distribution is the same.

    Args:
        probabilities_of: a pass of the model, see :data:`ProbabilitiesOf`.
        length: S, ids per sequence.
        window: largest W, draft ids per pass; 0 is sampling one by one.
        seed: of the noise.
        numbers: B numbers of the sequences.

    Returns:
        (B, S) int64 ids, and (B,) int64 passes after which each sequence was complete, between 1 and S.

    Raises:
        QLIPError: a length below 1, a window below 0, or a seed or number out of range.
    """
    check_integer("length", length)
    check_integer("window", window, 0)
    batch = torch.arange(len(numbers))[:, None]  # (B, 1)
    ids = torch.zeros(len(numbers), length, dtype=torch.int64)
    lengths, passes = torch.zeros(2, len(numbers), dtype=torch.int64)
    draft, proposed = ids[:, :0], torch.zeros(len(numbers), 0, 1, dtype=torch.float64)  # (B, W); q (B, W, V)
    number = 0
    while bool((lengths < length).any()):
        found = _normalized(probabilities_of(ids, lengths, draft))  # p, (B, W + 1, V)
        accept, fresh = (uniforms(seed, numbers, length, 1, 2 * number + i)[..., 0] for i in (0, 1))  # (B, S)
        places = lengths[:, None] + torch.arange(draft.shape[1] + 1)  # (B, W + 1)
        inside = places.clamp(max=length - 1)
        # A draft for the last position is not used: once its p is known, an id can be drawn from p itself.
        usable = places[:, :-1] < length - 1
        count, weights = _verify(found, proposed, draft, accept[batch, inside[:, :-1]], usable)
        drawn = draw_from(weights, fresh[batch, inside.gather(1, count[:, None])][:, 0])  # (B,)

        settled = torch.cat([draft, drawn[:, None]], 1).scatter(1, count[:, None], drawn[:, None])  # (B, W + 1)
        kept = (torch.arange(draft.shape[1] + 1) <= count[:, None]) & (places < length)
        ids[batch.expand_as(kept)[kept], places[kept]] = settled[kept]
        passes += lengths < length
        lengths = (lengths + count + 1).clamp(max=length)

        ahead = torch.arange(max(0, min(window, length - 1 - int(lengths.min()))))
        proposed = found[batch, (count[:, None] + 1 + ahead).clamp(max=draft.shape[1])]
        draft = draw_from(proposed, fresh[batch, (lengths[:, None] + ahead).clamp(max=length - 1)])
        draft = draft.clamp(max=found.shape[-1] - 1)  # rows beyond S may be NaN
        number += 1
    return ids, passes


def _verify(found: Tensor, proposed: Tensor, draft: Tensor, noise: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Accept ids of a draft from its first on.

    Args:
        found: p, (B, W + 1, V) float64.
        proposed: q, (B, W, V) float64, which the draft was drawn from.
        draft: (B, W) int64.
        noise: (B, W) float64 uniforms.
        usable: (B, W) bool; an id that is not usable is not accepted, and its position draws from p.

    Returns:
        (B,) int64 accepted ids per sequence, and (B, V) weights that the id after them is drawn from.
    """
    width = draft.shape[1]
    chance, share = (one.gather(-1, draft[..., None])[..., 0] for one in (found[:, :width], proposed))  # p(x), q(x)
    count = (usable & (noise * share < chance)).long().cumprod(-1).sum(-1)
    batch = torch.arange(len(draft))
    weights = found[batch, count]
    if not width:
        return count, weights
    place = count.clamp(max=width - 1)
    rest = (weights - proposed[batch, place]).clamp(min=0)
    refused = (count < width) & usable[batch, place] & (rest.sum(-1) > 0)  # 0 if p and q differ by rounding alone
    return count, torch.where(refused[:, None], rest, weights)


def _normalized(probabilities: Tensor) -> Tensor:
    """Probabilities in float64 on the CPU, summing to 1: p and q of an id are compared, and subtracted."""
    probabilities = probabilities.cpu().double()
    return probabilities / probabilities.sum(-1, keepdim=True)
