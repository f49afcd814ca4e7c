"""The network of ``fd_vgg16``: LPIPS' VGG16, which every machine that judges images already holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.evaluation.networks.base import FeatureNetwork

if TYPE_CHECKING:
    from qlip.evaluation.networks.lpips import LPIPS


class VGG16Features(FeatureNetwork):
    """Features of `fd_vgg16`: LPIPS' VGG16 after its last convolution (relu5_3), averaged over places.

    Args:
        network: ``LPIPS.from_cache("vgg")``; it is shared, not copied.

    Raises:
        QLIPError: it is not of VGG16.
    """

    name = "fd_vgg16"
    short = "vgg16"
    smallest = 16
    input = "at their own size, ImageNet's mean and deviation"

    def __init__(self, network: LPIPS) -> None:
        super().__init__()
        if network.net != "vgg":
            raise QLIPError(f"{self.name} is over LPIPS' network vgg, got {network.net!r}")
        self.network = network
        last = network.features[-1]
        assert isinstance(last, nn.Conv2d)
        self.dimensions = last.out_channels

    @property
    def manifold(self) -> str:
        """Names the layer: precision and recall of the paper (arXiv 1904.06991) are over VGG16's fc2, others."""
        return "vgg16_relu5"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images at their own size.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 16.

        Returns:
            (B, 512) float32.
        """
        return self.network.levels_and_pooled(images)[1]

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 512) float32."""
        features: Tensor = self(2 * self.checked(images) - 1)
        return features
