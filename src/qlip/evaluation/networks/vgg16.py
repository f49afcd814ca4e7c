"""The network of ``fd_vgg16``: LPIPS' VGG16, which every machine that judges images already holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        self._last, self.dimensions = last, last.out_channels

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Yields a list that takes the features of all images which LPIPS looks at inside: one pass serves both."""
        heard: list[Tensor] = []

        def take(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            del module, given
            heard.append(F.relu(result.detach()).mean((2, 3)))

        hook = self._last.register_forward_hook(take)
        try:
            yield heard
        finally:
            hook.remove()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Images at their own size.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 16.

        Returns:
            (B, 512) float32.
        """
        with self.listening() as heard:
            self.network.levels(pictures)
        (features,) = heard
        return features

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 512) float32."""
        features: Tensor = self(2 * self.checked(pictures) - 1)
        return features
