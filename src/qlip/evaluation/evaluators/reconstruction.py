"""Reconstruction quality: pixel metrics and LPIPS of pairs, bits per pixel, and a baseline of equal bytes.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, MetricValue, Rows, mean
from qlip.evaluation.metrics.pixel import SMALLEST_MS_SSIM, l1, ms_ssim, psnr, round_to_8_bit, split, ssim
from qlip.evaluation.models.base import RECONSTRUCT, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.networks.base import PIECE
from qlip.evaluation.networks.lpips import LPIPS, SMALLEST, Net
from qlip.modeling import to_uint8

UNITS = {"psnr": ("dB", "higher"), "ssim": ("", "higher"), "ms_ssim": ("", "higher"), "l1": ("", "lower")}
"""Unit and better direction of a metric by its name; for LPIPS lower is better."""


class Reconstruction(Evaluator):
    """Images against what a model rebuilds of them, both as 8-bit RGB at the model's size, as one saves them.

    Metrics: means over images of ``psnr`` (over images with an error; ``psnr_exact`` counts the others, if any),
    ``ssim``, ``ms_ssim`` (images of 176 pixels a side or more), ``l1`` (see
    :mod:`qlip.evaluation.metrics.pixel`), ``lpips_vgg``, ``lpips_alex`` (:mod:`qlip.evaluation.networks.lpips`);
    ``shrink_psnr`` and
    ``shrink_ssim`` of :func:`shrink_to_bytes` at the same bytes per image; ``bits_per_pixel``, 8 x bytes / (H W), and
    ``compression_ratio``, the bytes of 8-bit RGB over those of all images; these where bytes are known.

    Tables: for each of psnr, lpips_vgg and lpips_alex that is measured, ``worst_<figure>`` and ``best_<figure>``:
    records with the image's ``key`` and all its metrics, the worst or best first. Arrays: with ``thumbnails``, the
    same names, (n, 2, 3, h, w) uint8, of the original and what was rebuilt.

    Args:
        lpips: networks, of ``vgg`` and ``alex``; they cost as much as a small model does.
        shrink: measure the baseline.
        examples: images a table.
        thumbnails: the longer side, pixels, of images kept for the tables; 0 keeps none. Takes 6 x side^2 bytes a
            image of the set until it is measured; `reconstruct_by_key` does without.
        cache_dir: where LPIPS' weights are, instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.
    """

    name: ClassVar[str] = "reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({RECONSTRUCT})
    may_be_infinite: ClassVar[frozenset[str]] = frozenset({"psnr", "shrink_psnr"})  # equal images

    def __init__(
        self,
        lpips: Sequence[Net] = (),
        shrink: bool = True,
        examples: int = 12,
        thumbnails: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        if unknown := sorted(set(lpips) - set(get_args(Net))):
            raise QLIPError(f"LPIPS knows the networks vgg and alex, got {unknown[0]!r}")
        self.lpips, self.shrink, self.examples, self.thumbnails = tuple(lpips), shrink, examples, thumbnails
        self._cache_dir = cache_dir
        self._networks: dict[str, LPIPS] = {}
        self._key = ""

    def settings(self) -> Mapping[str, object]:
        """Arguments that decide which metrics are computed."""
        return {
            "compared": "8-bit RGB",
            "lpips": list(self.lpips),
            "shrink": self.shrink,
            "thumbnails": self.thumbnails,
        }

    def check(self, model: EvalModel) -> None:
        """See that the networks are there and the images large enough for them."""
        super().check(model)
        height, width = model.preprocessing.size
        for net in self.lpips:
            if min(height, width) < SMALLEST[net]:
                raise QLIPError(
                    f"{model.name}: {width}x{height} pixels are too few for lpips_{net}, which takes {SMALLEST[net]}"
                    " a side at least; leave it out"
                )
            self._network(net, model.device)

    def _network(self, net: Net, device: torch.device) -> LPIPS:
        if net not in self._networks:
            self._networks[net] = LPIPS.from_cache(net, self._cache_dir)
        return self._networks[net].to(device)

    def rows(self, batch: ModelBatch) -> Columns:
        """Every metric of each image, float64, and ``num_bytes`` int64."""
        originals, found = batch.originals, batch.reconstruction
        rebuilt = found.pixels
        columns = {metric.__name__: metric(rebuilt, originals) for metric in (psnr, ssim, l1)}
        if min(originals.shape[2:]) >= SMALLEST_MS_SSIM:
            columns["ms_ssim"] = ms_ssim(rebuilt, originals)
        for net in self.lpips:
            columns[f"lpips_{net}"] = self._distances(net, batch)
        if self.shrink and bool(found.num_bytes.all()):
            shrunk = torch.empty_like(originals)
            for num_bytes in found.num_bytes.unique().tolist():  # one but for codecs
                those = (found.num_bytes == num_bytes).to(originals.device)
                shrunk[those] = round_to_8_bit(shrink_to_bytes(originals[those], num_bytes))
            columns |= {"shrink_psnr": psnr(shrunk, originals), "shrink_ssim": ssim(shrunk, originals)}
        columns = {name: column.cpu().double() for name, column in columns.items()}
        columns["num_bytes"] = found.num_bytes.cpu()
        columns["pixels"] = torch.full_like(columns["num_bytes"], originals.shape[2:].numel())
        if self.thumbnails:
            columns["thumbnails"] = _thumbnails(originals, rebuilt, self.thumbnails)
        return columns

    def _distances(self, net: Net, batch: ModelBatch) -> Tensor:
        """(B,) of LPIPS. VGG16's pooled features are shared through the batch with distances between sets."""
        network = self._network(net, batch.model.device)
        distances, pooled, pooled_originals = [], [], []
        for rebuilt, originals in split(batch.reconstruction.pixels, batch.originals, PIECE):
            levels, pooled_original = network.levels_and_pooled(2 * originals - 1)
            own, pooled_rebuilt = network.levels_and_pooled(2 * rebuilt - 1)
            distances.append(network.compare(own, levels))
            pooled.append(pooled_rebuilt)
            pooled_originals.append(pooled_original)
        if net == "vgg":
            self._key = self._key or VGG16Features(network).key()
            batch.shared(f"originals, {self._key}", partial(torch.cat, pooled_originals))
            batch.shared(f"rebuilt, {self._key}", partial(torch.cat, pooled))
        return torch.cat(distances)

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Means, bytes, and the images at both ends."""
        measured = ["psnr", "ssim", "l1", *(f"lpips_{net}" for net in self.lpips)]
        if min(model.preprocessing.size) >= SMALLEST_MS_SSIM:
            measured.insert(2, "ms_ssim")
        metrics = {name: rows.column(name) for name in measured}
        found = MetricResult({})
        for name, column in metrics.items():
            _add(found, name, column)
        if bool((num_bytes := rows.column("num_bytes")).all()):
            if self.shrink:
                for name in ("shrink_psnr", "shrink_ssim"):
                    _add(found, name, rows.column(name))
            metrics["bits_per_pixel"] = 8 * num_bytes.double() / rows.column("pixels")
            found.values["bits_per_pixel"] = rate = mean(metrics["bits_per_pixel"], unit="bit")
            low, high = (None if bound is None else 24 / bound for bound in (rate.high, rate.low))
            found.values["compression_ratio"] = MetricValue(24 / rate.value, low, high, rate.count)
        found.notes |= _notes(model, found.values)
        for name in ("psnr", "lpips_vgg", "lpips_alex"):
            if name in metrics:
                self._ends(found, name, metrics, rows)
        return found

    def _ends(self, found: MetricResult, by: str, metrics: Mapping[str, Tensor], rows: Rows) -> None:
        """The worst and best images by a metric; of equal ones the earlier."""
        count = min(self.examples, len(rows))
        for name, descending in ((f"worst_{by}", by != "psnr"), (f"best_{by}", by == "psnr")):
            order = metrics[by].argsort(descending=descending, stable=True)[:count].tolist()
            found.tables[name] = [
                {"key": rows.keys[at], **{metric: float(column[at]) for metric, column in metrics.items()}}
                for at in order
            ]
            if self.thumbnails and order:
                found.arrays[name] = _taken(rows, order)


def _add(found: MetricResult, name: str, column: Tensor) -> None:
    """Add a mean over images; of a PSNR, over those with an error, and the number of the others."""
    unit, better = UNITS.get(name.removeprefix("shrink_"), ("", "lower"))
    found.add_mean(name, column, unit=unit, better=better)
    if exact := int(torch.isinf(column).sum()):
        total, left = len(column), len(column) - exact
        found.values[f"{name}_exact"] = MetricValue(float(exact), count=total, unit="images")
        mean_of = f"the mean is over the other {left:,}" if left else "there is no error to average"
        found.notes[name] = f"{exact:,} of {total:,} images came back exactly; {mean_of}"


def _notes(model: EvalModel, values: Mapping[str, MetricValue]) -> dict[str, str]:
    notes = {name: note for name, note in model.notes.items() if name in values}
    height, width = model.preprocessing.size
    if "ms_ssim" not in values:
        notes["ms_ssim"] = f"not measured: its five scales take {SMALLEST_MS_SSIM} pixels a side, not {width}x{height}"
    return notes


def _thumbnails(originals: Tensor, rebuilt: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] twice to (B, 2, 3, h, w) uint8 on the CPU, never enlarged."""
    height, width = originals.shape[2:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    both = torch.stack((originals, rebuilt), 1).flatten(0, 1)
    if scale < 1:
        both = F.interpolate(both, size, mode="bicubic", antialias=True).clamp(0, 1)
    found: Tensor = to_uint8(both).unflatten(0, (-1, 2))
    return found.cpu()


def _taken(rows: Rows, positions: Sequence[int]) -> Tensor:
    """Thumbnails at positions, in their order, with no more than a chunk of the others in memory."""
    found: dict[int, Tensor] = {}
    start = 0
    for (images,) in rows.stream("thumbnails"):
        found |= {at: images[at - start].clone() for at in positions if start <= at < start + len(images)}
        start += len(images)
    return torch.stack([found[at] for at in positions])


def shrink_to_bytes(images: Tensor, num_bytes: int) -> Tensor:
    """Shrink images to a number of bytes of raw 8-bit RGB and enlarge them again, both bicubically.

    Args:
        images: (B, 3, H, W) in [0, 1].
        num_bytes: at most; the sides keep the image's shape as well as whole pixels allow.

    Returns:
        (B, 3, H, W), clamped to [0, 1].
    """
    height, width = images.shape[2:]
    budget = max(1, num_bytes // 3)
    rows = max(1, math.floor(math.sqrt(budget * height / width)))
    small = F.interpolate(images, (rows, max(1, budget // rows)), mode="bicubic", antialias=True).clamp(0, 1)
    found: Tensor = F.interpolate(round_to_8_bit(small), (height, width), mode="bicubic").clamp(0, 1)
    return found
