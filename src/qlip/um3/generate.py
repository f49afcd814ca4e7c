"""Continuation of text and images: `generate`, and `stream`, which yields ids as they are drawn.

An id is drawn from the rows that the `Grammar` allows, and only their logits are computed, so the softmax is over text
or over the values of a group. Guidance leads an image away from one without a prompt: a second row per sequence, in the
same cache, reads the image alone. Shapes: B sequences, R rows of the model, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.lm.cache import KVCache
from qlip.lm.complete import ENDED, Steps, complete
from qlip.lm.guidance import Constant, Guidance, mix
from qlip.lm.sampling import Sampling
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3
from qlip.um3.sequence import IN_TEXT, TEXT_TOKENS, AllowedIds

Mode = Literal["text", "image", "interleaved"]
MODES: tuple[Mode, ...] = get_args(Mode)
SAMPLING = Sampling(1.0, top_p=0.95)
"""The paper's."""
Group = tuple[AllowedIds, float]
"""Allowed ids and scale of guidance, which sequences must share to be drawn together."""


def generate(
    model: UM3,
    prompts: Sequence[Sequence[int]],
    *,
    generation_mode: Mode = "interleaved",
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue sequences of text and images.

    Args:
        model: in eval mode; on a CPU `qlip.lm.pack` of its decoder makes it faster.
        prompts: B sequences of ids, with the BOS if the tokenizer has one; they may hold images.
        generation_mode: "text" draws no image, "image" draws one and ends, "interleaved" may draw any number.
        max_tokens: new ids; by default those of an image for "image", and 256 more than an image has for "interleaved".
        sampling: temperature 1 and top-p 0.95 by default.
        guidance: scale of an image's tokens; none by default.
        seed: of the noise.
        numbers: numbers of the sequences, which choose their noise; 0, 1, ... by default.

    Returns:
        B lists of new ids; the last is the end of the text, or of the image for "image", unless ids ran out. The begin
        of the image that "image" draws is not among them.

    Raises:
        QLIPError: an unknown mode, a prompt that is cut inside an image or holds ids of another model, or a context or
            `max_tokens` that cannot hold an image.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        generation_mode=generation_mode,
        max_tokens=max_tokens,
        sampling=sampling,
        guidance=guidance,
        seed=seed,
        numbers=numbers,
    ):
        for row, id_ in zip(found, step.tolist(), strict=True):
            if id_ != ENDED:
                row.append(id_)
    return found


@torch.inference_mode()
def stream(
    model: UM3,
    prompts: Sequence[Sequence[int]],
    *,
    generation_mode: Mode = "interleaved",
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Continue sequences, and yield the ids of each step as they are drawn; see :func:`generate`.

    Args:
        model, prompts, generation_mode, max_tokens, sampling, guidance, seed, numbers: see :func:`generate`.
        cache: of `rows_of` rows, which holds the first ids of the only prompt; it then holds all but the last id.

    Yields:
        (B,) int64, -1 for sequences that have ended; no more when all have.
    """
    config = model.config
    if generation_mode not in MODES:
        raise QLIPError(f"generation_mode {generation_mode!r}: give {', '.join(MODES)}")
    if not prompts:
        return
    begin = [config.begin_image] if generation_mode == "image" else []
    rows = [[*prompt, *begin] for prompt in prompts]
    if not all(rows):
        raise QLIPError("an empty prompt; give some text, or the BOS of the tokenizer")
    names = ["the prompt, "] if len(rows) == 1 else [f"prompt {number}, " for number in range(len(rows))]
    states = [model.grammar.behind(row, name) for row, name in zip(rows, names, strict=True)]
    guided = rows_of(config, generation_mode, guidance) == 2
    limit = limit_of(model, generation_mode, max_tokens, max(map(len, rows)), states)
    ends = (config.end_image,) if generation_mode == "image" else config.decoder.stop_ids
    firsts = [bos_of(config, row) for row in rows]
    steps = UM3Steps(model, sampling or SAMPLING, guidance if guided else None, generation_mode, states, firsts, ends)
    images = [alone(config, row) for row in rows] if guided else []
    if cache is not None and cache.length:
        if len(rows) > 1:
            raise QLIPError(f"a cache of one sequence for {len(rows)}; give prompts alone")
        rows = [row[cache.length :] for row in rows]
        if guided:
            cache.padding = torch.zeros(cache.rows, cache.length, dtype=torch.bool, device=model.device)
            cache.padding[1:] = True
    rows += images
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)  # (R, T)
    lacking = [width - len(row) for row in rows]
    yield from complete(
        model.decoder,
        model.decoder.embed(padded),
        torch.tensor(lacking) if any(lacking) else None,
        max_tokens=limit,
        stop=ends,
        seed=seed,
        numbers=numbers,
        cache=cache,
        how=steps,
    )


def rows_of(config: UM3Config, mode: Mode, guidance: Guidance | None) -> int:
    """Rows of the model per sequence: 2 if images are drawn with guidance, else 1."""
    if mode == "text" or guidance is None:
        return 1
    return 1 + (max(guidance.scale(token, config.num_tokens) for token in range(config.num_tokens)) > 1)


def bos_of(config: UM3Config, ids: Sequence[int]) -> list[int]:
    """The BOS that a prompt begins with, or nothing."""
    return [ids[0]] if ids[0] == config.decoder.bos_token_id else []


def alone(config: UM3Config, ids: Sequence[int]) -> list[int]:
    """Ids that the row without a prompt reads: the image that is being drawn, behind the BOS if the prompt has one."""
    begins = [place for place, id_ in enumerate(ids) if id_ == config.begin_image]
    unfinished = begins and len(ids) - begins[-1] <= config.image_length + 1
    image = list(ids[begins[-1] :]) if unfinished else []
    return [*bos_of(config, ids), *image] or [ids[-1]]


def limit_of(model: UM3, mode: Mode, max_tokens: int | None, prompt: int, states: Sequence[int]) -> int:
    """Largest number of new ids; the model's context may end before.

    Args:
        model, mode, max_tokens: see :func:`generate`.
        prompt: number of ids of the longest prompt, with the begin of its image for mode "image".
        states: of the grammar behind the prompts.

    Raises:
        QLIPError: a context or `max_tokens` that is too small.
    """
    config, cost = model.config, model.grammar.image_cost
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens)
    if mode == "image":
        if max_tokens is not None and max_tokens < cost - 1:
            raise QLIPError(f"max_tokens {max_tokens:,} cannot hold an image, which has {cost - 1:,} ids; give more")
        if prompt + cost - 1 > config.decoder.length:
            raise QLIPError(
                f"a prompt of {prompt - 1:,} ids and an image of {cost:,} with its begin and end do not fit in the"
                f" context of {config.decoder.length:,}; shorten the prompt"
            )
        return cost - 1
    if prompt >= config.decoder.length:
        raise QLIPError(f"{prompt:,} ids fill the context of {config.decoder.length:,}; shorten the prompt")
    rest = max((config.image_length + 1 - state for state in states if state != IN_TEXT), default=0)
    if max_tokens is not None and max_tokens < rest:
        raise QLIPError(f"max_tokens {max_tokens:,}: the image in the prompt needs {rest:,} more ids; give as many")
    if mode == "text":
        return max_tokens or rest + TEXT_TOKENS
    if max_tokens is not None and max_tokens < cost:
        raise QLIPError(
            f"max_tokens {max_tokens:,} cannot hold an image, which has {cost:,} ids with its begin and end; give more,"
            " or draw text alone"
        )
    return max_tokens or cost + TEXT_TOKENS


class UM3Steps(Steps):
    """Draws from the rows that the grammar allows; with guidance, from those of two branches.

    The row without a prompt reads the image alone: what stands before it is padding to it.

    Args:
        model, sampling, mode: see :func:`generate`.
        guidance: None is none, and one branch.
        states: of the grammar behind the prompts.
        firsts: BOS of each prompt, or nothing.
        ends: ids that end a sequence.
    """

    def __init__(
        self,
        model: UM3,
        sampling: Sampling,
        guidance: Guidance | None,
        mode: Mode,
        states: list[int],
        firsts: Sequence[Sequence[int]],
        ends: Collection[int],
    ) -> None:
        super().__init__(model.decoder, sampling)
        self.config, self.grammar, self.mode = model.config, model.grammar, mode
        self.guidance, self.states, self.ends = guidance or Constant(1.0), states, ends
        self.firsts = firsts
        self.branches = 1 if guidance is None else 2
        self.ended = [False] * len(states)

    def draw(self, hidden: Tensor, noise: Tensor, left: int) -> Tensor:
        """See :class:`qlip.lm.complete.Steps`."""
        groups: dict[Group, list[int]] = {}
        for row, state in enumerate(self.states):
            if not self.ended[row]:
                groups.setdefault(self._group(state, left), []).append(row)
        drawn = torch.zeros(len(self.states), dtype=torch.int64, device=hidden.device)
        for (allowed, scale), rows in groups.items():
            drawn[rows] = self._draw(hidden, noise, rows, allowed, scale)
        for row, id_ in enumerate(drawn.tolist()):
            if not self.ended[row]:
                self.states[row] = self.grammar.advance(self.states[row], id_)
                self.ended[row] = id_ in self.ends
        return drawn

    def _group(self, state: int, left: int) -> Group:
        if state == IN_TEXT:
            return self.grammar.allowed(state, 0 if self.mode == "text" else left), 1.0
        scale = self.guidance.scale(state // self.config.num_groups, self.config.num_tokens)
        return self.grammar.allowed(state), scale

    def _draw(self, hidden: Tensor, noise: Tensor, rows: list[int], allowed: AllowedIds, scale: float) -> Tensor:
        count, size = len(self.states), allowed.end - allowed.begin
        if size == 1:
            return torch.full((len(rows),), allowed.begin, device=hidden.device)
        guided = scale > 1
        read = [*rows, *(count + row for row in rows)] if guided else rows
        states = hidden if len(read) == len(hidden) else hidden[read]
        logits = self.model.logits(states, allowed.begin, allowed.end).float()
        if guided:
            given, null = logits.chunk(2)
            logits = mix(given, null, scale)
        mask = None
        if allowed.without:
            mask = torch.ones(size, dtype=torch.bool, device=hidden.device)
            mask[[one - allowed.begin for one in allowed.without]] = False
        return self.sampling.draw(logits, noise[rows], mask) + allowed.begin

    def embed(self, ids: Tensor, cache: KVCache) -> Tensor:
        """See :class:`qlip.lm.complete.Steps`."""
        if self.branches == 1:
            return super().embed(ids, cache)
        if cache.padding is None:
            cache.padding = torch.zeros(cache.rows, cache.length, dtype=torch.bool, device=ids.device)
        without, hidden = ids.tolist(), list[int]()
        for row, (state, first) in enumerate(zip(self.states, self.firsts, strict=True)):
            if state == IN_TEXT:
                without[row] = first[0] if first else 0
            if state == IN_TEXT or (state == 0 and not first):
                hidden.append(len(self.states) + row)
        cache.padding[hidden] = True
        return self.model.embed(torch.cat([ids, ids.new_tensor(without)]))[:, None]
