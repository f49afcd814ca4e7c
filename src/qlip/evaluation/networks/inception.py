"""The network of FID: Inception (Szegedy et al., arXiv 1512.00567) as the graph of 2015-12-05 has it.

It is the third version but for three poolings: averages beside convolutions leave the border's padding out of their
count, and the last block takes a maximum. Layers carry the names of the published file, which are torchvision's.

Three ways to give it images are in use, and metrics over them differ in the first decimal:

- ``tensorflow``: the original's, and torch-fidelity's. Pixels in [0, 255] are resized as TensorFlow 1 does (bilinear,
  no antialias, corners not aligned: a place i of the result is at i * H / 299 of the image), then (x - 128) / 128.
- ``pytorch-fid``: pixels in [0, 1] are resized with places at their centres, (i + 1/2) * H / 299 - 1/2, then 2 x - 1.
- ``clean-fid``, mode ``clean``: pixels in [0, 255] are resized as Pillow resizes floats (bicubic with antialias), not
  rounded, then (x - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.data.public.inception import read_published, read_weights
from qlip.errors import QLIPError
from qlip.evaluation.networks.base import FeatureNetwork, frozen

Convention = Literal["tensorflow", "pytorch-fid", "clean-fid"]
SIDE = 299
Kernel = int | tuple[int, int]


class Inception(FeatureNetwork):
    """The average over places after the last block (``pool3``), 2,048 features: over it a Frechet distance is FID.

    Weights are as random as any new module's; :meth:`from_cache` and :meth:`from_file` give the published ones.

    Args:
        convention: how images come to it; metrics of another than the original's say so in their names.
    """

    name = "fid"
    short = "inception"
    suffix = ""
    dimensions = 2048
    side = SIDE

    def __init__(self, convention: Convention = "tensorflow") -> None:
        super().__init__()
        if convention not in get_args(Convention):
            raise QLIPError(f"Inception's input is {', '.join(get_args(Convention))}, got {convention!r}")
        self.convention = convention
        if convention != "tensorflow":
            self.suffix = "_" + convention.replace("-", "_")
            self.short = f"inception{self.suffix}"
        resize = "bicubic with antialias" if convention == "clean-fid" else "bilinear without antialias"
        self.input = f"{SIDE}x{SIDE}, {resize}, both sides, as {convention} does"
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _Square(192, 32)
        self.Mixed_5c = _Square(256, 64)
        self.Mixed_5d = _Square(288, 64)
        self.Mixed_6a = _Shrink(288)
        self.Mixed_6b = _Seven(768, 128)
        self.Mixed_6c = _Seven(768, 160)
        self.Mixed_6d = _Seven(768, 160)
        self.Mixed_6e = _Seven(768, 192)
        self.Mixed_7a = _ShrinkSeven(768)
        self.Mixed_7b = _Wide(1280, "average")
        self.Mixed_7c = _Wide(2048, "maximum")
        frozen(self)

    @classmethod
    def from_cache(cls, cache_dir: str | Path | None = None, convention: Convention = "tensorflow") -> Inception:
        """The published weights, as ``qlip data get inception`` put them into the cache.

        Raises:
            QLIPError: they are not there, or damaged.
        """
        found = cls(convention)
        found.load_state_dict(read_weights(cache_dir))
        return found

    @classmethod
    def from_file(cls, path: str | Path, convention: Convention = "tensorflow") -> Inception:
        """The published file itself, ``pt_inception-2015-12-05-6726825d.pth``.

        Raises:
            QLIPError: no such file, or its checksum is another: over other weights a distance is not FID.
        """
        found = cls(convention)
        found.load_state_dict(read_published(Path(path)))
        return found

    def train(self, mode: bool = True) -> Inception:
        """Stay in eval mode; a module that holds this one may be put into training mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 2048) float32."""
        images = self.checked(images).float()
        if self.convention == "tensorflow":
            x = (resize_like_tensorflow(255 * images, SIDE) - 128) / 128
        elif self.convention == "clean-fid":
            resized = F.interpolate(255 * images, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
            x = (resized.clamp(0, 255) - 128) / 128
        else:
            x = 2 * F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean((2, 3))
        return features


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear without aligned corners: (B, C, H, W) to (B, C, side, side).

    A place i of the result is at i * H / side of the image: the first rows match, not the centres.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        before = at.floor().long().clamp_max(size - 1)
        after = (before + 1).clamp_max(size - 1)
        share = (at - before).view([-1 if one == axis else 1 for one in range(4)])
        low, high = images.index_select(axis, before), images.index_select(axis, after)
        images = low + (high - low) * share
    return images


class _Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, size_in: int, size_out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size_in, size_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(size_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branches(nn.Module):
    """Base of the blocks: convolutions by name, in sequence and in parallel."""

    def _add(self, prefix: str, size_in: int, *layers: tuple[str, int, Kernel], stride: int = 1) -> None:
        """Convolutions that keep the places but for the last one, which has the stride and then no padding."""
        for number, (suffix, size_out, kernel) in enumerate(layers):
            last = number == len(layers) - 1
            step, padding = (stride, 0) if last and stride > 1 else (1, _around(kernel))
            setattr(self, f"{prefix}{suffix}", _Convolution(size_in, size_out, kernel, step, padding))
            size_in = size_out

    def _through(self, x: Tensor, prefix: str, suffixes: Sequence[str]) -> Tensor:
        for suffix in suffixes:
            x = getattr(self, f"{prefix}{suffix}")(x)
        return x


def _around(kernel: Kernel) -> Kernel:
    """The padding that keeps the places."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


def _average(x: Tensor) -> Tensor:
    """Average over 3x3 places; padding is not counted."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Square(_Branches):
    """MetricValue 5: 1x1, 5x5, two 3x3, and an average."""

    def __init__(self, size: int, size_pool: int) -> None:
        super().__init__()
        self._add("branch1x1", size, ("", 64, 1))
        self._add("branch5x5", size, ("_1", 48, 1), ("_2", 64, 5))
        self._add("branch3x3dbl", size, ("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3))
        self._add("branch_pool", size, ("", size_pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        small, five = self._through(x, "branch1x1", [""]), self._through(x, "branch5x5", ["_1", "_2"])
        three = self._through(x, "branch3x3dbl", ["_1", "_2", "_3"])
        return torch.cat([small, five, three, self._through(_average(x), "branch_pool", [""])], 1)


class _Shrink(_Branches):
    """Reduction from 35 to 17 places per side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._add("branch3x3", size, ("", 384, 3), stride=2)
        self._add("branch3x3dbl", size, ("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self._through(x, "branch3x3dbl", ["_1", "_2", "_3"])
        return torch.cat([self._through(x, "branch3x3", [""]), three, F.max_pool2d(x, 3, 2)], 1)


class _Seven(_Branches):
    """MetricValue 6: 1x1, 7x7 in rows and columns, that twice, and an average."""

    def __init__(self, size: int, inside: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self._add("branch1x1", size, ("", 192, 1))
        self._add("branch7x7", size, ("_1", inside, 1), ("_2", inside, row), ("_3", 192, column))
        twice = (("_2", inside, column), ("_3", inside, row), ("_4", inside, column), ("_5", 192, row))
        self._add("branch7x7dbl", size, ("_1", inside, 1), *twice)
        self._add("branch_pool", size, ("", 192, 1))

    def forward(self, x: Tensor) -> Tensor:
        small, seven = self._through(x, "branch1x1", [""]), self._through(x, "branch7x7", ["_1", "_2", "_3"])
        twice = self._through(x, "branch7x7dbl", ["_1", "_2", "_3", "_4", "_5"])
        return torch.cat([small, seven, twice, self._through(_average(x), "branch_pool", [""])], 1)


class _ShrinkSeven(_Branches):
    """Reduction from 17 to 8 places per side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._add("branch3x3", size, ("_1", 192, 1), ("_2", 320, 3), stride=2)
        seven = (("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3))
        self._add("branch7x7x3", size, *seven, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self._through(x, "branch7x7x3", ["_1", "_2", "_3", "_4"])
        return torch.cat([self._through(x, "branch3x3", ["_1", "_2"]), seven, F.max_pool2d(x, 3, 2)], 1)


class _Wide(_Branches):
    """MetricValue 7: 1x1, 3x3 whose rows and columns stand side by side, that after another 3x3, and a pool."""

    def __init__(self, size: int, pool: Literal["average", "maximum"]) -> None:
        super().__init__()
        self.pool = pool
        self._add("branch1x1", size, ("", 320, 1))
        self._add("branch3x3", size, ("_1", 384, 1))
        self._add("branch3x3dbl", size, ("_1", 448, 1), ("_2", 384, 3))
        for prefix, end in (("branch3x3", "_2"), ("branch3x3dbl", "_3")):
            self._add(f"{prefix}{end}", 384, ("a", 384, (1, 3)))
            self._add(f"{prefix}{end}", 384, ("b", 384, (3, 1)))
        self._add("branch_pool", size, ("", 192, 1))

    def forward(self, x: Tensor) -> Tensor:
        three, twice = self._through(x, "branch3x3", ["_1"]), self._through(x, "branch3x3dbl", ["_1", "_2"])
        sides = [self._through(three, "branch3x3_2", [one]) for one in "ab"]
        sides += [self._through(twice, "branch3x3dbl_3", [one]) for one in "ab"]
        pooled = _average(x) if self.pool == "average" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([self._through(x, "branch1x1", [""]), *sides, self._through(pooled, "branch_pool", [""])], 1)
