"""Drawing images' indices from a decoder: `generate`.

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
from qlip.lm.cache import KVCache
from qlip.lm.conditions import Condition, Prefix
from qlip.lm.guidance import Constant, Guidance, mix
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
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    images_per_condition: int = 1,
    allowed: Allowed | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw images.

    Args:
        model: in eval mode.
        condition: of C samples.
        sampling: temperature and filters; plain sampling by default.
        guidance: schedule of classifier-free guidance; none by default. The null branch runs only up to the last token
            whose scale is above 1.
        seed: of the noise.
        numbers: image numbers, B = C * ``images_per_condition``; 0, 1, ... by default. Images of one condition follow
            each other.
        images_per_condition: images drawn from each condition.
        allowed: values allowed at a step.
        on_step: called after each step.

    Returns:
        (B, N, K) int64 indices, in raster order.

    Raises:
        QLIPError: a condition that does not fit, a model in training mode, logits that are not finite, or nothing
            allowed at a step.
    """
    config = model.config
    check_integer("images_per_condition", images_per_condition)
    if model.training:
        raise QLIPError("the decoder is in training mode, with dropout; call model.eval() first")
    if allowed is not None and config.head.kind in ("bits", "masked_bits"):
        raise QLIPError(
            f"allowed values need a softmax over a group's values; the head {config.head.kind!r} draws bits"
        )
    sampling, guidance = sampling or Sampling(), guidance or Constant(1.0)
    images = len(condition) * images_per_condition
    numbers = range(images) if numbers is None else numbers
    if len(numbers) != images:
        raise QLIPError(f"{len(numbers)} image numbers for {images} images; give one number per image")

    scales = [guidance.scale(token, config.num_tokens) for token in range(config.num_tokens)]
    guided = max((token + 1 for token, scale in enumerate(scales) if scale > 1), default=0)  # tokens with two branches
    cache, hidden = _start(model, condition, images_per_condition, guided > 0)

    steps, per_token = config.num_steps, config.num_steps // config.num_tokens
    noise = uniforms(seed, numbers, config.num_tokens, model.head.num_draws * per_token)
    noise = noise.reshape(images, steps, -1).to(model.device)
    drawn = torch.zeros(images, steps, config.groups_per_step, dtype=torch.int64, device=model.device)
    for step in range(steps):
        token = step // per_token
        mask = None if allowed is None else allowed(step, drawn[:, :step])
        pick = _Pick(sampling, scales[token], images, noise[:, step], mask)
        drawn[:, step] = model.head.draw(hidden, pick, step)
        if on_step is not None:
            on_step(step + 1, drawn[:, : step + 1])
        if step + 1 < steps:
            if (step + 1) // per_token == guided and guided:
                cache = cache.first(images)
            rows = drawn[:, step : step + 1].repeat(cache.rows // images, 1, 1)
            x = model.add_target_positions(model.embed_steps(rows, step), 0, first=step + 1)
            hidden = model.run(x, cache=cache)[:, -1]
    return drawn.reshape(images, config.num_tokens, config.num_groups)


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


def _start(model: DecoderModel, condition: Condition, repeats: int, guided: bool) -> tuple[KVCache, Tensor]:
    """Run the prefixes, and return a cache of R rows and the state (R, D) that predicts the first step."""
    count = len(condition)
    prefix = model.condition(condition)
    rows = torch.arange(count, device=model.device).repeat_interleave(repeats)
    if guided:
        null = model.condition.null(condition)
        if model.config.condition != "features":  # the same for all
            null = Condition(null.values[:1])
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
