"""Statistics of a dataset's features in a file, computed once and compared with many times.

The file is safetensors: ``mean`` (D,) and ``covariance`` (D, D) float64, ``features`` (K, D) float32 of some of the
images for what needs more than moments, and in its metadata, under ``statistics``, JSON of their origin.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qlip.data.sources.npz import read_npz
from qlip.errors import QLIPError
from qlip.evaluation.metrics.frechet import Moments
from qlip.evaluation.networks import FeatureNetwork
from qlip.files import write_bytes
from qlip.modeling import to_uint8

FORMAT = 1
MOMENTS = ("mu", "sigma")
"""Arrays of an ``.npz`` file of statistics."""
_CLEAN_FID = re.compile(r"_(clean|legacy_pytorch)_(train|test|val|custom)\w*\.npz$")
"""Names that clean-fid gives to statistics of images that were resized in other ways."""
_CONVENTIONS = {"clean": "clean-fid", "legacy_pytorch": "pytorch-fid"}
"""Input of Inception by clean-fid's mode."""
UNKNOWN = 1_000_000_000
"""Images that moments stand for whose number is not known: no fewer than any set has."""
KEPT = 10_000
"""Images whose features are kept for kernel distance, precision and recall, at most: moments are of all."""


@dataclass(frozen=True)
class Origin:
    """The images and the network that statistics were computed from.

    Attributes:
        network: name, weights and input, as :meth:`FeatureNetwork.described` gives them.
        count: images; 0 if it is not known.
        size: their (height, width) in pixels, as the network was given them.
        preparation: how they came to be that size, in words.
        source: data set and split, or a path.
        digest: SHA-256 (hex) over the images, in order: :class:`Gathered` says how it is taken.
        kept: images whose features are kept.
        seed: of the draw of those.
    """

    network: dict[str, object]
    count: int
    size: tuple[int, int]
    preparation: str
    source: str
    digest: str
    kept: int
    seed: int


@dataclass
class Statistics:
    """Moments and some features of a set, and what they are of."""

    origin: Origin
    moments: Moments
    features: Tensor

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance, "features": self.features}
        words = json.dumps({"format": FORMAT, **asdict(self.origin)})
        data = save({name: one.contiguous() for name, one in tensors.items()}, {"statistics": words})
        write_bytes(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file.

        Raises:
            QLIPError: no such file, or not one of statistics, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                words = json.loads(file.metadata()["statistics"])
                tensors = {name: file.get_tensor(name) for name in ("mean", "covariance", "features")}
        except FileNotFoundError:
            raise QLIPError(f"{path}: no such file; make one from the set of images to compare with") from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise QLIPError(f"{path}: no file of statistics ({type(error).__name__}); make it again") from None
        if words.pop("format", None) != FORMAT:
            raise QLIPError(f"{path}: statistics of another format; make them again")
        try:
            origin = Origin(**{**words, "size": tuple(words["size"])})
        except (KeyError, TypeError):
            raise QLIPError(f"{path}: does not say what its statistics are of; make them again") from None
        mean, covariance, features = tensors["mean"], tensors["covariance"], tensors["features"]
        _check_tensors(path, origin, mean, covariance, features)
        return cls(origin, Moments.given(origin.count, mean, covariance), features)

    @classmethod
    def from_npz(cls, path: str | Path, network: FeatureNetwork, size: tuple[int, int]) -> Statistics:
        """Read the moments ``mu`` and ``sigma`` of a file as ADM, pytorch-fid and clean-fid write them.

        Such files hold no features, and say neither which images they are of nor how these were prepared; the
        dimension alone tells the network.

        Args:
            path: of the ``.npz`` file.
            network: that they are taken to be of.
            size: (height, width) of the images they are compared with.

        Raises:
            QLIPError: no such file or arrays, not of this network's dimension, or of another way to resize by its name.
        """
        mode = _CLEAN_FID.search(Path(path).name)
        if mode and _CONVENTIONS[mode[1]] != getattr(network, "convention", None):
            raise QLIPError(
                f"{path}: statistics of clean-fid's mode {mode[1]}, which resizes images for the network in another"
                " way; take those of legacy_tensorflow, or for mode clean the preparation clean-fid"
            )
        arrays = read_npz(path, *MOMENTS)
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in MOMENTS)
        if mean.dim() != 1 or len(mean) != network.dimensions:
            raise QLIPError(
                f"{path}: mu is {tuple(mean.shape)}, and {network.name} has {network.dimensions} features; statistics"
                " are compared over the network that made them"
            )
        origin = Origin(
            network=network.described(),
            count=0,
            size=size,
            preparation="network and preparation are not in the file",
            source=str(path),
            digest=hashlib.sha256(mean.numpy().tobytes() + covariance.numpy().tobytes()).hexdigest(),
            kept=0,
            seed=0,
        )
        features = torch.empty(0, network.dimensions)
        _check_tensors(path, replace(origin, count=UNKNOWN), mean, covariance, features)
        return cls(origin, Moments.given(UNKNOWN, mean, covariance), features)

    def check(self, network: FeatureNetwork, size: tuple[int, int]) -> None:
        """Refuse a comparison of what was looked at in different ways.

        Args:
            network: that looks at the other set.
            size: (height, width) of its images.

        Raises:
            QLIPError: another network, other weights or input of it, or images of another size.
        """
        theirs, ours = self.origin.network, network.described()
        for key in ("network", "weights", "input"):
            if theirs.get(key) != ours[key]:
                was, now = (str(one.get(key))[:60] for one in (theirs, ours))
                raise QLIPError(
                    f"statistics of {self.origin.source}: {key} is {was}, here it is {now}; make them again"
                )
        if self.origin.size != size:
            (height, width), (own_height, own_width) = self.origin.size, size
            raise QLIPError(
                f"statistics of {self.origin.source} are of {width}x{height} pixels, these images have"
                f" {own_width}x{own_height}; make both of one size"
            )


def _check_tensors(path: str | Path, origin: Origin, mean: Tensor, covariance: Tensor, features: Tensor) -> None:
    dimensions = len(mean)
    whole = mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (dimensions, dimensions)
    if not whole or features.shape != (origin.kept, dimensions) or origin.count < 2:
        raise QLIPError(f"{path}: its tensors do not go together; make it again")
    if not all(bool(torch.isfinite(one).all()) for one in (mean, covariance, features)):
        raise QLIPError(f"{path}: holds numbers that are not finite; make it again")


@dataclass
class Gathered:
    """Features of images that come in batches: moments of all, features of a random few, a digest of the pixels.

    Which images are kept depends on their number and the seed alone (reservoir sampling, algorithm R: Vitter, 1985).

    Attributes:
        dimensions: D.
        most: features kept.
        seed: of the draw.
    """

    dimensions: int
    most: int = KEPT
    seed: int = 0
    moments: Moments = field(init=False)
    _kept: list[Tensor] = field(init=False, default_factory=list)
    _digest: Any = field(init=False, default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self.moments = Moments(self.dimensions)
        self._draw = torch.Generator().manual_seed(self.seed)

    def add(self, features: Tensor, images: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            features: (B, D).
            images: (B, 3, H, W) in [0, 1], which the digest is over, as 8-bit RGB; None leaves the digest alone.
        """
        start = self.moments.count
        self.moments.add(features)
        rows = features.detach().float().cpu()
        for number, row in enumerate(rows, start=start):
            if len(self._kept) < self.most:
                self._kept.append(row.clone())
            elif (place := int(torch.randint(number + 1, (), generator=self._draw))) < self.most:
                self._kept[place] = row.clone()
        if images is not None:
            pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
            self._digest.update(pixels.tobytes())

    @property
    def features(self) -> Tensor:
        """(K, D) float32 of the kept images."""
        return torch.stack(self._kept) if self._kept else torch.empty(0, self.dimensions)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all images' 8-bit pixels, rows from the top, RGB, one after the other."""
        found: str = self._digest.hexdigest()
        return found
