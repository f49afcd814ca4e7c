"""Drawing a part of an image: tokens in a hole are replaced, the others stay exactly.

A decoder draws in raster order, so it sees only the kept tokens before a token. What comes after the hole is brought in
by sampling-importance-resampling: several candidates for the hole are drawn, each is weighed by the likelihood of the
kept tokens behind it, and one is chosen in proportion to its weight. With many candidates the choice has the
distribution of the hole given all kept tokens. One candidate is plain fixing of tokens, which often does not join what
is below.

`inpaint` draws; `read_edit` makes an `Edit` of an image and a mask, or of a share of the image that is kept.

Shapes: B images, N tokens, K groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.lm import Condition, DecoderModel, Guidance, Sampling, generate
from qlip.lm.generate import OnStep
from qlip.lm.sampling import uniforms
from qlip.modeling.images import ImageInput
from qlip.modeling.indices import regroup
from qlip.modeling.processor import Size
from qlip.tokens import ImageCodec
from qlip.tokens.image_codec import Fit

CANDIDATES = 16
ROWS = 64
"""Largest number of candidates in a pass of the decoder, unless one image has more."""
STRIDE = 0x9E3779B97F4A7C15
"""Candidate c of image n is drawn as image n + c * STRIDE modulo 2^64, so the first is what `generate` draws."""
CHOICE_ROUND = 1
"""Round of the noise that chooses a candidate; see :func:`qlip.lm.sampling.uniforms`."""
WHITE = 128
"""Least grey level of a mask that is taken for white."""


@dataclass(frozen=True)
class Edit:
    """An image of which a part is drawn.

    Attributes:
        indices: (N, K) int64, the image in the decoder's groups.
        hole: bool (N,), True for the tokens to draw.
        candidates: drawn per image, see :func:`inpaint`.
    """

    indices: Tensor
    hole: Tensor
    candidates: int = CANDIDATES


@torch.inference_mode()
def inpaint(
    decoder: DecoderModel,
    condition: Condition,
    indices: Tensor,
    hole: Tensor,
    *,
    candidates: int = CANDIDATES,
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
    negative: Condition | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    choice_temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the tokens of a hole.

    Args:
        decoder: in eval mode.
        condition: of B samples.
        indices: (B, N, K) int64, the images; tokens in the hole are not read.
        hole: bool (N,), True for the tokens to draw.
        candidates: drawn per image.
        sampling, guidance: of the candidates, see `generate`. Weights are the decoder's likelihoods, without either.
        negative: condition that guidance leads away from, of one sample or of B.
        seed: of the noise.
        numbers: B image numbers, 0, 1, ... by default.
        choice_temperature: divides the logarithms of the weights; 0 takes the likeliest candidate.
        on_step: see `generate`; called only where an image has a single candidate.

    Returns:
        (B, N, K) int64; an image depends on its condition and indices, the seed and its number alone.

    Raises:
        QLIPError: indices, a hole, or a condition that do not fit the decoder; see `generate`.
    """
    count, device = len(indices), decoder.device
    candidates = check_integer("candidates", candidates)
    numbers = range(count) if numbers is None else numbers
    decoder.check_indices(indices)
    if tuple(hole.shape) != (decoder.config.num_tokens,) or hole.dtype != torch.bool:
        raise QLIPError(
            f"hole of shape {tuple(hole.shape)}, {hole.dtype}: give a bool per token, ({decoder.config.num_tokens},)"
        )
    if len(condition) != count or len(numbers) != count:
        raise QLIPError(
            f"{len(condition)} conditions and {len(numbers)} image numbers for {count} images; give one per image"
        )
    hole, indices = hole.cpu(), indices.to(device)
    behind = ~hole & (hole.cumsum(0) > 0)  # kept tokens that the hole's candidates are weighed by
    if not behind.any():
        candidates = 1
    found = list[Tensor]()
    for start in range(0, count, max(1, ROWS // candidates)):
        images = torch.arange(start, min(count, start + max(1, ROWS // candidates)))
        rows = images.repeat_interleave(candidates)
        given = condition.rows(rows.tolist())
        drawn = generate(
            decoder,
            given,
            sampling=sampling,
            guidance=guidance,
            negative=negative if negative is None or len(negative) == 1 else negative.rows(rows.tolist()),
            seed=seed,
            numbers=[(numbers[i] + c * STRIDE) % (1 << 64) for i in images.tolist() for c in range(candidates)],
            indices=indices[rows.to(device)],
            keep=~hole.expand(len(rows), -1),
            on_step=on_step if candidates == 1 else None,
        )
        if candidates > 1:
            nats = (decoder(drawn, given).sum(2) * behind.to(device)).sum(1)  # (b * candidates,)
            logits = -nats.view(-1, candidates).double()
            noise = uniforms(seed, [numbers[i] for i in images.tolist()], 1, 1, CHOICE_ROUND)[:, 0, 0].to(device)
            chosen = Sampling(temperature=choice_temperature).draw(logits, noise)  # (b,)
            drawn = drawn.unflatten(0, (-1, candidates))[torch.arange(len(images), device=device), chosen]
        found.append(drawn)
    return torch.cat(found)


def read_edit(
    decoder: DecoderModel,
    codec: ImageCodec,
    image: ImageInput,
    mask: ImageInput | None = None,
    keep: float | None = None,
    candidates: int = CANDIDATES,
) -> Edit:
    """Encode an image, and find the tokens to draw.

    Args:
        decoder: draws tokens of the codec.
        codec: prepares and encodes the image.
        image: of any size.
        mask: image of equal size, white where the image is to be drawn; a token with a white pixel is drawn whole.
        keep: instead of a mask, share of the tokens that is kept, see :func:`tail`.
        candidates: see :func:`inpaint`.

    Raises:
        QLIPError: an image that cannot be read, a mask of another size or that leaves nothing to draw or to keep, a
            share out of range, or not one of both.
    """
    config, model = decoder.config, codec.model
    height, width = (side * model.patch_size for side in config.grid)
    size = None if config.grid == model.grid else (height, width)
    if mask is not None and keep is None:
        hole = read_hole(codec, image, mask, size)
    elif keep is not None and mask is None:
        hole = tail(config.num_tokens, keep)
    else:
        raise QLIPError("an image without a part to draw: give either a mask or the share that is kept")
    [tokens] = codec.encode_prepared([codec.prepare(image, Fit(size=size))])
    indices = regroup(tokens.indices(model.group_size), config.group_size, from_group_size=model.group_size)
    return Edit(indices, hole, check_integer("candidates", candidates))


def tail(num_tokens: int, keep: float) -> Tensor:
    """Hole of a variation: all tokens but the first share of them in raster order.

    The first tokens are the ones to keep, since the decoder draws each token given those before it: the rest is then
    drawn from its exact distribution, without candidates. For another part of the image, use a mask.

    Args:
        num_tokens: N.
        keep: share of the tokens that is kept, from 0 to less than 1.

    Returns:
        bool (N,).

    Raises:
        QLIPError: a share out of range, or one that keeps every token.
    """
    kept = round(keep * num_tokens) if 0 <= keep < 1 else num_tokens
    if kept == num_tokens:
        raise QLIPError(f"keep {keep:g}: give a share from 0 to less than 1, so that a token of {num_tokens} is drawn")
    return torch.arange(num_tokens) >= kept


def read_hole(codec: ImageCodec, image: ImageInput, mask: ImageInput, size: Size | None = None) -> Tensor:
    """Read a mask of an image as a hole: the tokens with a white pixel.

    The mask is resized and cropped as the codec prepares the image.

    Args:
        codec: whose tokens are drawn.
        image: the image.
        mask: image of equal size; pixels of a grey level of 128 or more are white.
        size: (height, width) other than the model's that the image is resized to.

    Returns:
        bool (N,).

    Raises:
        QLIPError: an image that cannot be read, a mask of another size, or one without white or without black in the
            part of the image that the model sees.
    """
    preprocessing = codec.processor.preprocessing
    name = str(mask) if isinstance(mask, str | Path) else "mask"
    drawn, original = preprocessing.load(mask, name).convert("L"), preprocessing.load(image)
    if drawn.size != original.size:
        raise QLIPError(
            f"{name}: {drawn.width} x {drawn.height} pixels, but the image has {original.width} x {original.height};"
            " give a mask of the image's size"
        )
    white = np.asarray(drawn) >= WHITE
    if not white.any():
        raise QLIPError(f"{name}: no white pixel; paint what is to be drawn white, the rest black")
    exact = Image.fromarray(white.astype(np.float32))  # averages of which are 0 only where no pixel is white
    box = replace(preprocessing, resample=int(Image.Resampling.BOX)).resized(exact, size=size)
    side = codec.model.patch_size
    cells = torch.from_numpy(np.array(box) > 0).unflatten(1, (-1, side)).unflatten(0, (-1, side))
    hole: Tensor = cells.any(3).any(1).flatten()
    if not hole.any():
        raise QLIPError(f"{name}: no white pixel in the centre of the image, which is all that the model sees")
    if hole.all():
        raise QLIPError(
            f"{name}: white everywhere, so that nothing of the image is kept; paint black what is to stay (transparent"
            " pixels are white), or draw without an image"
        )
    return hole
