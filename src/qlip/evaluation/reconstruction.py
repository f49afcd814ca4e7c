"""How much of a picture its tokens keep, beside a baseline of equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlip.data.evalset import EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.fidelity import shrink_to_bytes
from qlip.evaluation.frechet import Moments, VGG16Features, frechet_distance
from qlip.evaluation.metrics import psnr, ssim
from qlip.evaluation.protocol import Measurement, preparation
from qlip.evaluation.rebuilding import eight_bit
from qlip.modeling import QLIPModel, QLIPProcessor, indices_to_bits

if TYPE_CHECKING:
    from qlip.evaluation.lpips import LPIPS


@torch.inference_mode()
def measure_reconstruction(
    model: QLIPModel,
    processor: QLIPProcessor,
    data: EvalSet,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    perceptual: LPIPS | None = None,
    frechet: bool = False,
    dead_below: float | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """PSNR, SSIM and L1 of pictures against what their tokens rebuild, the bits' marginals, and a baseline.

    Pictures are compared as 8-bit RGB at the model's size, as a person would save them. The baseline shrinks the
    picture bicubically to as many raw RGB bytes as its tokens take and enlarges it again.

    Args:
        model: in eval mode.
        processor: of the same checkpoint.
        data: from :func:`qlip.evaluation.open_evaluation`.
        batch_size, num_workers: of the pass.
        perceptual: on the model's device; adds ``lpips``.
        frechet: adds ``fd_vgg16`` between originals and reconstructions, and what to keep in mind about it to the
            notes; read only with ``perceptual``, whose network it is over.
        dead_below: adds ``bits_dead``, the number of bits whose marginal has less entropy, in bits.
        advance: called with the number of pictures done, for a progress bar.

    Returns:
        Means over pictures; ``bit_marginal_min`` and ``_max`` are over all bits, of the share of tokens where it is 1.

    Raises:
        QLIPError: no picture could be read; or a Frechet distance without its network.
    """
    if frechet and perceptual is None:
        raise QLIPError(f"{VGG16Features.name} is over LPIPS' network; give perceptual too")
    sums: dict[str, float] = {}
    ones = torch.zeros(model.num_bits, dtype=torch.float64)
    count = broken = tokens = 0
    judge = None if perceptual is None else _Judge(perceptual, frechet)
    for batch in data.batches(batch_size, num_workers):
        broken += len(batch.broken)
        if len(batch):
            pixel_values = batch.pixel_values.to(model.device, model.dtype)
            grid = model.grid_of(pixel_values)
            indices = model.encode(pixel_values)
            originals = eight_bit(processor.preprocessing.denormalize(batch.pixel_values))
            rebuilt = eight_bit(processor.preprocessing.denormalize(model.decode(indices, grid)).cpu())
            shrunk = eight_bit(shrink_to_bytes(originals, math.ceil(grid[0] * grid[1] * model.num_bits / 8)))
            values = {
                "psnr": psnr(rebuilt, originals),
                "ssim": ssim(rebuilt, originals),
                "l1": (rebuilt - originals).abs().mean((1, 2, 3)),
                "shrink_psnr": psnr(shrunk, originals),
                "shrink_ssim": ssim(shrunk, originals),
            }
            if judge is not None:
                values |= judge.see(rebuilt.to(model.device), originals.to(model.device))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            bits = indices_to_bits(indices.cpu(), model.group_size).flatten(0, 1)
            ones += bits.double().sum(0)
            tokens += len(bits)
            count += len(batch)
        advance(len(batch) + len(batch.broken))
    if not count:
        raise QLIPError(f"{data.source.name}: not one picture could be read; look at one with qlip info")
    marginals = ones / tokens
    means = {name: total / count for name, total in sums.items()}
    means |= {"bit_marginal_min": float(marginals.min()), "bit_marginal_max": float(marginals.max())}
    if dead_below is not None:
        entropies = -(torch.xlogy(marginals, marginals) + torch.xlogy(1 - marginals, 1 - marginals)) / math.log(2)
        means["bits_dead"] = float((entropies < dead_below).sum())
    notes: dict[str, Any] = {}
    if judge is not None and judge.features is not None:
        found = frechet_distance(judge.originals, judge.rebuilt)
        means[judge.features.name] = found.distance
        if found.warning is not None:
            notes[judge.features.name] = found.warning
    return Measurement(
        "reconstruction",
        data.source.name,
        count,
        broken,
        preparation(processor.preprocessing),
        means,
        notes,
    )


class _Judge:
    """LPIPS of pairs and, from the same pass, features of both sets."""

    def __init__(self, perceptual: LPIPS, frechet: bool) -> None:
        self.perceptual = perceptual
        self.features = VGG16Features(perceptual) if frechet else None
        dimensions = self.features.dimensions if self.features is not None else 0
        self.originals, self.rebuilt = Moments(dimensions), Moments(dimensions)

    def see(self, rebuilt: Tensor, originals: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] each to (B,) distances."""
        if self.features is None:
            return {"lpips": self._distances(rebuilt, originals)}
        with self.features.listening() as heard:
            distances = self._distances(rebuilt, originals)
        for moments, features in zip((self.originals, self.rebuilt), heard, strict=True):
            moments.add(features)
        return {"lpips": distances}

    def _distances(self, rebuilt: Tensor, originals: Tensor) -> Tensor:
        levels = self.perceptual.levels(2 * originals - 1)  # these are looked at first
        distances: Tensor = self.perceptual(2 * rebuilt - 1, levels)
        return distances
