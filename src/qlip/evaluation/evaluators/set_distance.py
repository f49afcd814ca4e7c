"""Distances between originals and reconstructions as sets: Frechet and kernel distance, precision and recall.

Both sets come from one pass, so they are of the same images. Each metric carries the name of the network whose
features it is over; ``rfid`` and ``kid`` are over the Inception network of 2015-12-05 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, MetricValue, Rows, mean
from qlip.evaluation.metrics.frechet import Moments, frechet_distance, frechet_jackknife
from qlip.evaluation.metrics.intervals import GROUPS, Jackknife
from qlip.evaluation.metrics.kid import SUBSET_SIZE, SUBSETS, kernel_distance, kernel_jackknife
from qlip.evaluation.metrics.precision_recall import NEIGHBOURS, precision_recall
from qlip.evaluation.metrics.statistics import KEPT, Gathered
from qlip.evaluation.models.base import RECONSTRUCT, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.networks import FeatureNetwork, Inception, ResNet50, VGG16Features, load

FEWEST = 2 * GROUPS
"""Images that the interval of a distance needs."""


class Seen(Protocol):
    """Features of a set of images: moments of all its images, features (K, D) of some."""

    @property
    def moments(self) -> Moments:
        """Feature moments over all images."""

    @property
    def features(self) -> Tensor:
        """Features of a subset of the images, (K, D)."""


class SetDistance(Evaluator):
    """Distances between the set of originals and that of reconstructions, both as 8-bit images at the same size.

    An image's features are kept as float32, so an interrupted pass can continue; moments stream over them in float64.

    Args:
        network: one of ``qlip.evaluation.networks.NETWORKS``, or a network itself; by default the class' own.
        weights, convention: of ``fid``; see :func:`qlip.evaluation.networks.load`.
        subsets, subset_size: of the kernel distance.
        neighbours: of precision and recall.
        kept: images that kernel distance, precision and recall are over, drawn at random where there are more.
        seed: of that draw, and of the kernel distance's.
    """

    name = "sets"
    needs = frozenset({RECONSTRUCT})
    default: ClassVar[str] = VGG16Features.name

    def __init__(
        self,
        network: str | FeatureNetwork | None = None,
        *,
        weights: str | Path | None = None,
        convention: str | None = None,
        subsets: int = SUBSETS,
        subset_size: int = SUBSET_SIZE,
        neighbours: int = NEIGHBOURS,
        kept: int = KEPT,
        seed: int = 0,
    ) -> None:
        if subsets < 1 or subset_size < 2 or neighbours < 1 or kept < 2:
            raise QLIPError("sets: takes 1 subset of 2 images, 1 neighbour and 2 images kept, or more of each")
        self._network = network if isinstance(network, FeatureNetwork) else None
        self._name = network if isinstance(network, str) else self.default
        self._weights, self._convention = weights, convention
        self._described: dict[str, object] | None = None
        self._key = ""
        self.subsets, self.subset_size, self.neighbours = subsets, subset_size, neighbours
        self.kept, self.seed = kept, seed

    @property
    def network(self) -> FeatureNetwork:
        """The network, loaded when it is first asked for."""
        if self._network is None:
            self._network = load(self._name, self._weights, self._convention)
        return self._network

    def check(self, model: EvalModel) -> None:
        """Refuse a model that cannot rebuild, and a network whose weights are not there."""
        super().check(model)
        self.network.to(model.device)

    def settings(self) -> Mapping[str, object]:
        """The network with its weights' fingerprint, and how metrics are drawn from its features."""
        if self._described is None:
            self._described = self.network.described()
        return {
            **self._described,
            "kernel distance": {"subsets": self.subsets, "size": self.subset_size},
            "neighbours": self.neighbours,
            "kept": self.kept,
            "seed": self.seed,
        }

    def rows(self, batch: ModelBatch) -> Columns:
        """Features of each original and of its reconstruction, (B, D) float32."""
        originals, rebuilt = batch.originals, batch.reconstruction.pixels
        if rebuilt.shape != originals.shape:
            raise QLIPError(
                f"{batch.model.name}: rebuilds {tuple(rebuilt.shape[2:])} from images of {tuple(originals.shape[2:])};"
                " sets of unequal sizes are not compared"
            )
        self._key = self._key or self.network.key()
        return {  # LPIPS over the same network has seen them already where it is measured too
            name: batch.shared(f"{name}, {self._key}", partial(self.network.features_in_pieces, one))
            for name, one in (("originals", originals), ("rebuilt", rebuilt))
        }

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """All metrics; those that need more images than there are, are left out and a note says so."""
        del model
        sets = [Gathered(self.network.dimensions, self.kept, self.seed) for _ in range(2)]
        for columns in rows.stream("originals", "rebuilt"):
            for one, features in zip(sets, columns, strict=True):
                one.add(features)
        real, others = sets
        return compared(
            self.network,
            real,
            others,
            name=distance_name(self.network, "r"),
            subsets=self.subsets,
            subset_size=self.subset_size,
            neighbours=self.neighbours,
            seed=self.seed,
            paired=True,
        )


class ResNetSets(SetDistance):
    """`SetDistance` over ResNet-50."""

    name = "sets_resnet50"
    default = ResNet50.name


class InceptionSets(SetDistance):
    """`SetDistance` over FID's Inception."""

    name = "sets_fid"
    default = Inception.name


def distance_name(network: FeatureNetwork, kind: str) -> str:
    """Name of a Frechet distance: over Inception ``rfid`` or ``gfid`` by its kind, else the network's."""
    return f"{kind}fid{network.suffix}" if isinstance(network, Inception) else network.name


def compared(
    network: FeatureNetwork,
    real: Seen,
    others: Seen,
    *,
    name: str,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
    paired: bool = False,
) -> MetricResult:
    """Every metric between two sets that one network saw.

    Args:
        network: that saw both.
        real: the originals.
        others: what is measured against them.
        name: of the Frechet distance.
        subsets, subset_size, seed: of the kernel distance.
        neighbours: of precision and recall.
        paired: both sets are of the same images in the same order.

    Returns:
        ``name``, ``kid`` (``kd_<network>`` where it is not Inception), ``precision_<features>``, ``recall_<features>``;
        the last two as shares, their intervals over images with the other set as it is. Distances have jackknife
        intervals over images, from 20 images on; a note has the expected bias of the Frechet distance.

    Raises:
        QLIPError: fewer than two images.
    """
    count, other_count = real.moments.count, others.moments.count
    if min(count, other_count) < 2:
        raise QLIPError(f"{name}: a distance between sets needs two images or more, got {min(count, other_count)}")
    found = MetricResult({})
    features = real.features, others.features
    _frechet(found, name, real, others, features, paired)
    kernel_name = f"kid{network.suffix}" if isinstance(network, Inception) else f"kd_{network.short}"
    if min(map(len, features)) >= 2:
        _kernel(found, kernel_name, features, paired, subsets, subset_size, seed)
    else:
        found.notes[kernel_name] = "left out: it needs features of images, and one set has moments alone"
    names = f"precision_{network.manifold}", f"recall_{network.manifold}"
    kept = min(map(len, features))
    if kept <= neighbours:
        for one in names:
            found.notes[one] = f"left out: {kept} images, and {neighbours} neighbours of each are needed"
        return found
    coverage = precision_recall(*features, neighbours=neighbours)
    for one, hits, whole in zip(names, (coverage.precise, coverage.recalled), (other_count, count), strict=True):
        found.values[one] = mean(hits, better="higher", seed=seed)
        if len(hits) < whole:
            found.notes[one] = f"over {len(hits)} images drawn from {whole}"
    return found


def _frechet(
    found: MetricResult, name: str, real: Seen, others: Seen, features: tuple[Tensor, Tensor], paired: bool
) -> None:
    frechet = frechet_distance(real.moments, others.moments)
    counts, notes = (real.moments.count, others.moments.count), [frechet.warning] if frechet.warning else []
    low = high = None
    if min(map(len, features)) >= FEWEST:
        first, second = (len(kept) / count for kept, count in zip(features, counts, strict=True))
        estimate = frechet_jackknife(*features, paired, (first, second))
        low, high = estimate.interval(frechet.distance)
        low = max(0.0, low)
        notes.append(
            f"expected bias at this number of images {estimate.bias:+.2g}, so about"
            f" {max(0.0, frechet.distance - estimate.bias):.3g} without it (jackknife)"
        )
    found.values[name] = MetricValue(frechet.distance, low, high, counts[1], better="lower")
    if notes:
        found.notes[name] = "; ".join(notes)


def _kernel(
    found: MetricResult, name: str, features: tuple[Tensor, Tensor], paired: bool, subsets: int, size: int, seed: int
) -> None:
    kernel = kernel_distance(*features, subsets=subsets, size=size, seed=seed)
    low = high = None
    if min(map(len, features)) >= FEWEST:
        error = math.hypot(kernel_jackknife(*features, paired).error, kernel.deviation / kernel.subsets**0.5)
        low, high = Jackknife(error, 0.0).interval(kernel.mean)  # its estimate has no bias
    found.values[name] = MetricValue(kernel.mean, low, high, min(map(len, features)), better="lower")
    found.notes[name] = f"mean of {kernel.subsets} subsets of {kernel.size} images, deviation {kernel.deviation:.3g}"
    if kernel.size < size:
        found.notes[name] += f"; {size} images a subset are usual"
