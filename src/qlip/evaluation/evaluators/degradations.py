"""Images made worse in known ways: JPEG, blur, noise, resizing, at five severities with pinned parameters.

==========  ==========================================  ============================  =======================
kind        what is done                                severity 1 to 5               from
==========  ==========================================  ============================  =======================
``jpeg``    Pillow's JPEG at a quality, 4:2:0           25, 18, 15, 10, 7             ImageNet-C
``blur``    Gaussian; deviation in % of shorter side    0.75, 1.2, 1.6, 2.2, 3        see below
``noise``   Gaussian a pixel and channel; deviation     0.08, 0.12, 0.18, 0.26, 0.38  ImageNet-C
``resize``  sides times a factor and back, bicubic      0.6, 0.5, 0.4, 0.3, 0.25      ImageNet-C's pixelation
==========  ==========================================  ============================  =======================

ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) blurs images of 224 pixels by 1 to 6 of them, and its sibling
of 64 pixels by 0.5 to 1.5; these shares of a side come near both, so that images of any size lose alike. Its
pixelation resizes with a box and back to blocks; here both ways are bicubic, as images on the web are resized.
Everything is done on 8-bit RGB at the model's size and gives 8-bit RGB. Noise is drawn from the image's key: not from
its place, nor from what else is in its batch.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.evaluation.metrics.pixel import blurred, gaussian
from qlip.evaluation.run.batch_cache import eight_bit
from qlip.modeling import to_images

Kind = Literal["jpeg", "blur", "noise", "resize"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARAMETERS: dict[Kind, tuple[float, ...]] = {
    "jpeg": (25, 18, 15, 10, 7),
    "blur": (0.75, 1.2, 1.6, 2.2, 3),
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "resize": (0.6, 0.5, 0.4, 0.3, 0.25),
}
"""By severity, 1 first."""
SEVERITIES = (1, 2, 3, 4, 5)


def degraded(pictures: Tensor, keys: Sequence[str], kind: Kind, severity: int) -> Tensor:
    """Images made worse.

    Args:
        images: (B, 3, H, W) float32 in [0, 1], 8-bit; see :func:`qlip.evaluation.run.batch_cache.eight_bit`.
        keys: B of them; noise depends on them.
        kind: of the table above.
        severity: 1 to 5.

    Returns:
        (B, 3, H, W) float32 in [0, 1], 8-bit, on the same device.

    Raises:
        QLIPError: no such kind or severity.
    """
    if kind not in KINDS or severity not in SEVERITIES:
        raise QLIPError(f"degradations are {', '.join(KINDS)} at severities 1 to 5; got {kind} at {severity}")
    parameter = PARAMETERS[kind][severity - 1]
    if kind == "jpeg":
        return _jpeg(pictures, round(parameter))
    if kind == "blur":
        return eight_bit(_blur(pictures, parameter / 100 * min(pictures.shape[2:])).clamp(0, 1))
    if kind == "noise":
        return eight_bit((pictures + parameter * _noise(pictures, keys)).clamp(0, 1))
    return _resize(pictures, parameter)


def _jpeg(pictures: Tensor, quality: int) -> Tensor:
    found = []
    for picture in to_images(pictures):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
        with Image.open(file) as image:
            found.append(np.array(image.convert("RGB")))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(pictures.device).float() / 255


def _blur(pictures: Tensor, sigma: float) -> Tensor:
    """Four deviations to each side, the image mirrored beyond its edges."""
    radius = min(max(1, int(4 * sigma + 0.5)), min(pictures.shape[2:]) - 1)
    return blurred(F.pad(pictures, (radius,) * 4, mode="reflect"), gaussian(radius, sigma))


def _noise(pictures: Tensor, keys: Sequence[str]) -> Tensor:
    """Of deviation 1, the same for a key at every severity."""
    shape = tuple(pictures.shape[1:])
    seeds = (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys)
    drawn = [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)).to(pictures.device)


def _resize(pictures: Tensor, factor: float) -> Tensor:
    height, width = pictures.shape[2:]
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = eight_bit(F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1))
    return eight_bit(F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1))
