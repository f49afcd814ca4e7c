"""The interface of feature networks, for distances between sets of images.

Shapes: B images of H x W pixels, D features.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError

PIECE = 2**19
"""Pixels that a network sees at once: eight images of 256 x 256, about 0.6 GiB of VGG16's features."""


class FeatureNetwork(nn.Module, ABC):
    """Maps images to feature vectors. Metrics over a network carry its name.

    Attributes:
        name: of the network in options and files, and of a Frechet distance over it, e.g. ``fd_vgg16``.
        short: ends the name of a kernel distance over it, e.g. ``kd_vgg16``.
        dimensions: D.
        smallest: pixels along a side, at least.
        side: to which images are resized inside; None where they keep their size.
        input: how images come to it, in words; part of every result.
    """

    name: ClassVar[str]
    short: str
    dimensions: int
    smallest: ClassVar[int] = 1
    side: ClassVar[int | None] = None
    input: str

    @property
    def manifold(self) -> str:
        """Ends the names of precision and recall over it, e.g. ``precision_resnet50``."""
        return self.short

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], on the network's device; of 8-bit images where results count.

        Returns:
            (B, D) float32, each row of its own image alone.

        Raises:
            QLIPError: no RGB images, or they are too small.
        """

    def features_in_pieces(self, images: Tensor) -> Tensor:
        """Like :meth:`features`, a few images at a time, so that memory does not grow with their number."""
        pixels = self.side**2 if self.side else max(1, images.shape[2:].numel())
        return torch.cat([self.features(some) for some in images.split(max(1, PIECE // pixels))])

    def checked(self, images: Tensor) -> Tensor:
        """The images, refused where they are none."""
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.smallest:
            raise QLIPError(
                f"{self.name} takes (B, 3, H, W) of at least {self.smallest} x {self.smallest} pixels,"
                f" got {tuple(images.shape)}"
            )
        return images

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all weights, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def described(self) -> dict[str, object]:
        """JSON of everything that features depend on beside the images."""
        return {"network": self.name, "weights": self.fingerprint(), "input": self.input}

    def key(self) -> str:
        """Tells its features apart from all others of the same images, for `ModelBatch.shared`."""
        return json.dumps(self.described(), sort_keys=True)


def frozen(network: nn.Module) -> None:
    """Put a network into eval mode and freeze its weights."""
    network.requires_grad_(False)
    network.eval()
