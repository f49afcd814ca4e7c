"""LPIPS: a distance between images as people see it (Zhang et al., arXiv 1801.03924, version 0.1 of its weights).

Shapes: B images of H x W pixels, five levels of a classifier's features with C_l channels on h_l x w_l places.

Features of both images are scaled to unit length along channels; their squared differences are weighted a channel by
learned weights >= 0, summed over channels, averaged over places, and summed over levels (eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.data.public.lpips import read_weights
from qlip.errors import QLIPError

Net = Literal["vgg", "alex"]
Features = list[Tensor]
"""(B, C_l, h_l, w_l) of unit length along C_l, the five levels in order."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet for RGB in [-1, 1], as in the authors' code."""
EPSILON = 1e-10

# (channels, kernel, stride, padding) of convolutions; a number is the side of a max pool of stride 2 before the next
_LAYERS: dict[Net, list[tuple[int, int, int, int] | int]] = {
    "vgg": [
        *[(64, 3, 1, 1)] * 2, 2, *[(128, 3, 1, 1)] * 2, 2, *[(256, 3, 1, 1)] * 3, 2, *[(512, 3, 1, 1)] * 3, 2,
        *[(512, 3, 1, 1)] * 3,
    ],
    "alex": [(64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
}  # fmt: skip
_LEVEL_ENDS: dict[Net, tuple[int, ...]] = {"vgg": (1, 3, 6, 9, 12), "alex": (0, 1, 2, 3, 4)}
"""After which convolutions (and their ReLU) a level's features are taken."""
SMALLEST: dict[Net, int] = {"vgg": 16, "alex": 31}
"""Pixels along a side that still leave the last level a place."""


class LPIPS(nn.Module):
    """The distance, with weights as random as any new module's; :meth:`from_cache` gives the published ones.

    Always frozen and in eval mode: gradients flow to images, none to weights. It computes in float32 under
    autocast too, for small differences of unit vectors are squared.

    Args:
        net: ``vgg`` (VGG16, for training) or ``alex`` (AlexNet, which agrees better with people on judging).
    """

    def __init__(self, net: Net = "vgg") -> None:
        super().__init__()
        if net not in _LAYERS:
            raise QLIPError(f"LPIPS knows the networks {' and '.join(_LAYERS)}, got {net!r}")
        self.net = net
        self.features, self._pools = _convolutions(net)
        sizes = [layer[0] for layer in _LAYERS[net] if not isinstance(layer, int)]
        channels = [sizes[end] for end in _LEVEL_ENDS[net]]
        self.linear = nn.ParameterList(nn.Parameter(torch.full((size,), 1 / size)) for size in channels)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_cache(cls, net: Net = "vgg", cache_dir: str | Path | None = None) -> LPIPS:
        """The published weights, as ``qlip data get lpips`` put them into the cache.

        Raises:
            QLIPError: they are not there, or damaged.
        """
        found = cls(net)
        found.load_state_dict(read_weights(net, cache_dir))
        return found

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode; a module that holds this one may be put into training mode."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor | Features) -> Tensor:
        """Distances of pairs.

        Args:
            images: (B, 3, H, W) in [-1, 1], any float type; what is outside is taken as it is.
            targets: the same shape; or their :meth:`levels`, which may be kept where the same images come again.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            QLIPError: no pairs of RGB images, or they are too small.
        """
        if isinstance(targets, Tensor):
            if images.shape != targets.shape:
                raise QLIPError(f"images {tuple(images.shape)} and targets {tuple(targets.shape)} are no pairs")
            targets = self.levels(targets)
        return self.compare(self.levels(images), targets)

    def compare(self, levels: Features, targets: Features) -> Tensor:
        """Distances (B,) float32 between the :meth:`levels` of B images and those of their targets."""
        distance = levels[0].new_zeros(len(levels[0]), dtype=torch.float32)
        with torch.autocast(distance.device.type, enabled=False):
            for weight, own, other in zip(self.linear, levels, targets, strict=True):
                difference = (own - other).square()
                distance = distance + torch.einsum("bchw,c->bhw", difference, weight).mean((1, 2))
        return distance

    def levels(self, images: Tensor) -> Features:
        """Features between which the distance is taken, of images (B, 3, H, W) in [-1, 1]; gradients flow through."""
        return self.levels_and_pooled(images)[0]

    def levels_and_pooled(self, images: Tensor) -> tuple[Features, Tensor]:
        """:meth:`levels`, and the last one before scaling, averaged over places: (B, C) float32 without a gradient."""
        smallest = SMALLEST[self.net]
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise QLIPError(
                f"LPIPS takes (B, 3, H, W) of at least {smallest} x {smallest} pixels, got {tuple(images.shape)}"
            )
        ends, found = _LEVEL_ENDS[self.net], []
        with torch.autocast(images.device.type, enabled=False):
            x = (images.float() - self.get_buffer("shift")) / self.get_buffer("scale")
            for number, (convolution, pool) in enumerate(zip(self.features, self._pools, strict=True)):
                if pool:
                    x = F.max_pool2d(x, pool, stride=2)
                x = F.relu(convolution(x))
                if number in ends:
                    found.append(_unit(x))
        return found, x.detach().mean((2, 3))


def _convolutions(net: Net) -> tuple[nn.ModuleList, Sequence[int]]:
    """The convolutions, and the pool before each (0 for none)."""
    convolutions, pools, pool, size_in = nn.ModuleList(), list[int](), 0, 3
    for layer in _LAYERS[net]:
        if isinstance(layer, int):
            pool = layer
            continue
        size_out, kernel, stride, padding = layer
        convolutions.append(nn.Conv2d(size_in, size_out, kernel, stride, padding))
        pools.append(pool)
        pool, size_in = 0, size_out
    return convolutions, pools


def _unit(features: Tensor) -> Tensor:
    """Unit length along channels. A place where all are 0 stays 0, and its gradient finite."""
    # vector_norm has the gradient 0 at 0, where that of a square root of a sum is not a number
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + EPSILON)
