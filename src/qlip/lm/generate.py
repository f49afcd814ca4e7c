"""Drawing images' indices from a decoder: `generate`, and `generate_jacobi` in fewer passes.

The prefix runs once per condition, and once for the null condition of guidance; then each step runs on all images
together. An image depends on its condition, the seed and its number alone, not on the batch: each draw has noise
keyed by (seed, image number, token, draw).

Shapes: B images, R rows of the transformer (B, or 2B with guidance, the conditional ones first), N tokens, K groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.lm import jacobi
from qlip.lm.cache import KVCache, StaticCache
from qlip.lm.conditions import Condition, Prefix
from qlip.lm.guidance import Constant, Guidance, mix
from qlip.lm.heads import FlatHead
from qlip.lm.model import DecoderModel
from qlip.lm.sampling import Sampling, uniforms

Allowed = Callable[[int, Tensor], Tensor | None]
"""From a step's number and the groups drawn so far, (B, s, K) or (B, s, 1) with the flat head, to the values allowed
next, bool (V,) or (B, V); None allows all."""
OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and the groups so far."""


@torch.inference_mode()
def generate(
    model: DecoderModel,
    condition: Condition,
    *,
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    negative: Condition | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    images_per_condition: int = 1,
    allowed: Allowed | None = None,
    indices: Tensor | None = None,
    keep: Tensor | None = None,
    on_step: OnStep | None = None,
    compile: bool = False,
) -> Tensor:
    """Draw images, or tokens between those that are given.

    Args:
        model: in eval mode.
        condition: of C samples.
        sampling: temperature and filters; plain sampling by default.
        guidance: schedule of classifier-free guidance; none by default. The null branch runs only up to the last token
            whose scale is above 1.
        negative: condition that guidance leads away from, of one sample or of C; the null condition by default.
        seed: of the noise.
        numbers: image numbers, B = C * ``images_per_condition``; 0, 1, ... by default. Images of one condition follow
            each other.
        images_per_condition: images drawn from each condition.
        allowed: values allowed at a step.
        indices: (B, N, K) int64, images of which some tokens are kept; the others are not read.
        keep: bool (B, N), True for the tokens of ``indices`` that are kept; the others are drawn, given all tokens
            before them in raster order. Kept tokens change no noise: where they are what was drawn, the rest is too.
        on_step: called after each step; not for tokens at the beginning and the end that all images keep.
        compile: compile the transformer's step, with CUDA graphs on a GPU; the first call takes a minute, further ones
            with as many rows none. Both branches of guidance then run to the end.

    Returns:
        (B, N, K) int64 indices, in raster order.

    Raises:
        QLIPError: a condition or indices that do not fit, a model in training mode, logits that are not finite, or
            nothing allowed at a step.
    """
    config = model.config
    check_integer("images_per_condition", images_per_condition)
    _check_eval(model)
    if allowed is not None and config.head.kind in ("bits", "masked_bits"):
        raise QLIPError(
            f"allowed values need a softmax over a group's values; the head {config.head.kind!r} draws bits"
        )
    sampling, guidance = sampling or Sampling(), guidance or Constant(1.0)
    images = len(condition) * images_per_condition
    numbers = _image_numbers(numbers, images)

    drawn, kept, asked = _given(model, images, indices, keep)
    if not any(asked):
        return drawn.reshape(images, config.num_tokens, config.num_groups)
    scales = [guidance.scale(token, config.num_tokens) for token in range(config.num_tokens)]
    places = [token for token, one in enumerate(asked) if one]
    guided = max((token + 1 for token in places if scales[token] > 1), default=0)  # tokens with two branches
    per_token = config.num_steps // config.num_tokens
    begin, end = places[0] * per_token, (places[-1] + 1) * per_token
    prefixes, hidden = _start(model, condition, images_per_condition, guided > 0, negative)
    if begin:
        rows = torch.cat([drawn[:, :begin]] * (prefixes.rows // images))
        hidden = model.run(model.add_target_positions(model.embed_steps(rows), 0, first=1), cache=prefixes)[:, -1]
    advance = _Compiled(model, prefixes) if compile else _Eager(model, prefixes)

    noise = uniforms(seed, numbers, config.num_tokens, model.head.num_draws * per_token)
    noise = noise.reshape(images, config.num_steps, -1).to(model.device)
    for step in range(begin, end):
        token = step // per_token
        if asked[token]:
            mask = None if allowed is None else allowed(step, drawn[:, :step])
            pick = _Pick(sampling, scales[token], images, noise[:, step], mask)
            fresh = model.head.draw(hidden, pick, step)
            drawn[:, step] = torch.where(kept[:, token, None], drawn[:, step], fresh)
        if on_step is not None:
            on_step(step + 1, drawn[:, : step + 1])
        if step + 1 < end:
            if (step + 1) // per_token == guided and guided:
                advance.keep(images)
            rows = torch.cat([drawn[:, step : step + 1]] * (advance.rows // images))
            hidden = advance(model.add_target_positions(model.embed_steps(rows, step), 0, first=step + 1))
    return drawn.reshape(images, config.num_tokens, config.num_groups)


def _given(
    model: DecoderModel, images: int, indices: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, list[bool]]:
    """Check what is kept.

    Returns:
        Groups of all steps, (B, S, K) or (B, S, 1) with the flat head, 0 where they are drawn; which tokens are kept,
        (B, N); and per token whether an image draws it.
    """
    config = model.config
    tokens = (images, config.num_tokens)
    if indices is None or keep is None:
        if indices is not keep:
            raise QLIPError("give indices and keep together: the images, and which of their tokens are kept")
        steps = torch.zeros(images, config.num_steps, config.groups_per_step, dtype=torch.int64, device=model.device)
        return steps, torch.zeros(tokens, dtype=torch.bool, device=model.device), [True] * config.num_tokens
    model.check_indices(indices)
    if len(indices) != images or tuple(keep.shape) != tokens or keep.dtype != torch.bool:
        raise QLIPError(
            f"indices of {len(indices)} images and keep of shape {tuple(keep.shape)}, {keep.dtype}, for {images}"
            f" images: give bool {tokens}, and indices of as many images"
        )
    kept = keep.to(model.device)
    steps = model.steps(indices.to(model.device).masked_fill(~kept[..., None], 0))
    return steps, kept, (~keep).any(0).tolist()


class _Eager:
    """The transformer's steps, from embeddings (R, 1, D) to states (R, D)."""

    def __init__(self, model: DecoderModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    @property
    def rows(self) -> int:
        return self.cache.rows

    def keep(self, rows: int) -> None:
        """Continue with the first rows alone."""
        self.cache = self.cache.first(rows)

    def __call__(self, x: Tensor) -> Tensor:
        return self.model.run(x, cache=self.cache)[:, -1]


class _Compiled:
    """Compiled steps, all of one shape."""

    def __init__(self, model: DecoderModel, cache: KVCache) -> None:
        self.step, self.cache = model.compiled_step(), StaticCache(cache)
        model.rotary()  # outside the graph

    @property
    def rows(self) -> int:
        return self.cache.rows

    def keep(self, rows: int) -> None:
        """Change nothing: other shapes would be compiled again."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.step(x, self.cache)[:, -1].clone()  # a graph writes its output to the same memory each time


@torch.inference_mode()
def generate_jacobi(
    model: DecoderModel,
    condition: Condition,
    *,
    window: int = 16,
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images one by one by speculative Jacobi decoding (:mod:`qlip.lm.jacobi`): several steps per pass.

    The distribution is that of `generate`, the images are others. Fewer passes pay where a pass over several positions
    costs as much as one over a single position, so on GPUs and for single images.

    Args:
        model: in eval mode, with a flat head.
        condition: of B samples.
        window: draft steps per pass.
        sampling, guidance, seed, numbers: see :func:`generate`.

    Returns:
        (B, N, K) int64 indices, and (B,) int64 passes of the model per image; `generate` takes N K.

    Raises:
        QLIPError: as :func:`generate`; or another head.
    """
    config = model.config
    if not isinstance(model.head, FlatHead):
        raise QLIPError(f"Jacobi decoding needs one softmax per step; the head {config.head.kind!r} is no flat one")
    if config.target_positions:
        raise QLIPError("Jacobi decoding is for decoders without target_positions; use generate")
    _check_eval(model)
    sampling, guidance = sampling or Sampling(), guidance or Constant(1.0)
    images = len(condition)
    numbers = _image_numbers(numbers, images)
    scales = [guidance.scale(token, config.num_tokens) for token in range(config.num_tokens)]
    prefixes, states = _start(model, condition, 1, max(scales) > 1)
    drawn, passes = list[Tensor](), list[Tensor]()
    for image, number in enumerate(numbers):
        rows = torch.arange(image, prefixes.rows, images, device=model.device)  # its conditional and its null row
        probabilities_of = _Draft(model, sampling, scales, prefixes.select(rows), states[rows])
        ids, count = jacobi.decode(probabilities_of, config.num_steps, window, seed, [number])
        drawn.append(ids)
        passes.append(count)
    indices = torch.cat(drawn).reshape(images, config.num_tokens, config.num_groups)
    return indices.to(model.device), torch.cat(passes)


class _Draft:
    """Probabilities of the steps of a draft, for one image; see :data:`qlip.lm.jacobi.ProbabilitiesOf`."""

    def __init__(
        self, model: DecoderModel, sampling: Sampling, scales: list[float], cache: KVCache, state: Tensor
    ) -> None:
        assert isinstance(model.head, FlatHead)
        self.model, self.head, self.sampling, self.scales, self.cache = model, model.head, sampling, scales, cache
        self.prefix, self.state = cache.length, state[:, None]  # (R, 1, D)

    def __call__(self, ids: Tensor, lengths: Tensor, draft: Tensor) -> Tensor:
        settled, steps = int(lengths[0]), self.model.config.num_steps
        if settled:
            self.cache.advance(self.prefix + settled - 1 - self.cache.length)  # what was not accepted is forgotten
            known = torch.cat([ids[:, settled - 1 : settled], draft], 1)[:, : steps - settled]
            rows = known.to(self.model.device)[..., None].expand(self.cache.rows, -1, -1)
            self.state = self.model.run(self.model.embed_steps(rows, settled - 1), cache=self.cache)
        per_token = steps // self.model.config.num_tokens
        found = list[Tensor]()
        for place in range(self.state.shape[1]):
            logits = self.head.step_logits(self.state[:, place], settled + place).float()  # (R, V)
            if len(logits) > 1:
                logits = mix(logits[:1], logits[1:], self.scales[(settled + place) // per_token])
            found.append(self.sampling.probabilities(logits))
        probabilities = torch.stack(found, 1)  # (1, places, V)
        missing = draft.shape[1] + 1 - probabilities.shape[1]  # steps beyond the last, which are not read
        return torch.nn.functional.pad(probabilities, (0, 0, 0, missing))


def _check_eval(model: DecoderModel) -> None:
    if model.training:
        raise QLIPError("the decoder is in training mode, with dropout; call model.eval() first")


def _image_numbers(numbers: Sequence[int] | None, images: int) -> Sequence[int]:
    numbers = range(images) if numbers is None else numbers
    if len(numbers) != images:
        raise QLIPError(f"{len(numbers)} image numbers for {images} images; give one number per image")
    return numbers


class _Pick:
    """Draws of one step; see :class:`qlip.lm.heads.Pick`."""

    def __init__(self, sampling: Sampling, scale: float, images: int, noise: Tensor, allowed: Tensor | None) -> None:
        self.sampling, self.scale, self.images, self.noise, self.allowed = sampling, scale, images, noise, allowed

    def __call__(self, logits: Tensor, first: int) -> Tensor:
        logits = logits.float()  # (R, M, V)
        if len(logits) > self.images:
            given, null = logits.split(self.images)
            logits = mix(given, null, self.scale)
        count = logits.shape[1]
        noise = self.noise[:, first : first + count].flatten()
        allowed = self.allowed
        if allowed is not None and allowed.ndim == 2:
            allowed = allowed.repeat_interleave(count, 0)
        return self.sampling.draw(logits.flatten(0, 1), noise, allowed).view(self.images, count)


def _start(
    model: DecoderModel, condition: Condition, repeats: int, guided: bool, negative: Condition | None = None
) -> tuple[KVCache, Tensor]:
    """Run the prefixes, and return a cache of R rows and the state (R, D) that predicts the first step."""
    count = len(condition)
    prefix = model.condition(condition)
    rows = torch.arange(count, device=model.device).repeat_interleave(repeats)
    if guided:
        if negative is None:
            null = model.condition.null(condition)
            if model.config.condition != "features":  # the same for all
                null = Condition(null.values[:1])
        else:
            null = negative
            if len(null) not in (1, count):
                raise QLIPError(f"{len(null)} negative conditions for {count} conditions; give one, or one for each")
        prefix = _joined(prefix, model.condition(null))
        rows = torch.cat([rows, count + (rows if len(null) == count else torch.zeros_like(rows))])
    cache = KVCache(model.config, len(prefix.embeddings), dtype=model.dtype, device=model.device)
    cache.start = prefix.start
    last = prefix.embeddings.shape[1] - 1
    hidden = model.run(model.add_target_positions(prefix.embeddings, last), cache=cache)[:, -1]
    if len(rows) != len(hidden):
        cache, hidden = cache.select(rows), hidden[rows]
    return cache, hidden


def _joined(one: Prefix, other: Prefix) -> Prefix:
    """Rows of both prefixes."""
    embeddings = torch.cat([one.embeddings, other.embeddings])
    if one.start is None and other.start is None:
        return Prefix(embeddings)
    starts = [
        torch.zeros(len(prefix.embeddings), dtype=torch.int64, device=embeddings.device)
        if prefix.start is None
        else prefix.start
        for prefix in (one, other)
    ]
    return Prefix(embeddings, torch.cat(starts))
