"""The network of ``fd_resnet50``: Keras' ResNet-50 (He et al., arXiv 1512.03385), trained on ImageNet.

It is the first version, whose strides are in the first 1x1 convolution of a stage. Convolutions have biases, the
normalisation's epsilon is 0.001, and images are what Caffe's were: BGR in [0, 255] less ImageNet's mean colour.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.data.public.resnet50 import BLOCKS, NORM_EPSILON, read_weights
from qlip.evaluation.networks.base import FeatureNetwork, frozen

SIDE = 224
MEAN_BGR = (103.939, 116.779, 123.68)
WIDTHS = {2: (64, 256), 3: (128, 512), 4: (256, 1024), 5: (512, 2048)}
"""Stage -> (channels inside a block, channels between blocks)."""


class ResNet50(FeatureNetwork):
    """The average over places after the last block: what its classifier reads.

    Weights are as random as any new module's; :meth:`from_cache` gives the published ones. Layers carry Keras' names.
    """

    name = "fd_resnet50"
    short = "resnet50"
    dimensions = 2048
    side = SIDE
    input = f"{SIDE}x{SIDE}, bilinear with antialias, both sides; BGR less mean colour"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self._add("conv1", "bn_conv1", 3, 64, 7, 2)
        size_in = 64
        for stage, letters in BLOCKS.items():
            inside, between = WIDTHS[stage]
            for letter in letters:
                stride = 2 if letter == "a" and stage > 2 else 1
                self._branch(stage, letter, "2a", size_in, inside, 1, stride)
                self._branch(stage, letter, "2b", inside, inside, 3, 1)
                self._branch(stage, letter, "2c", inside, between, 1, 1)
                if letter == "a":
                    self._branch(stage, letter, "1", size_in, between, 1, stride)
                size_in = between
        self.classifier = nn.Linear(self.dimensions, 1000)
        self.register_buffer("mean", torch.tensor(MEAN_BGR).view(3, 1, 1), persistent=False)
        frozen(self)

    @classmethod
    def from_cache(cls, cache_dir: str | Path | None = None) -> ResNet50:
        """The published weights, as ``qlip data get resnet50`` put them into the cache.

        Raises:
            QLIPError: they are not there, or damaged.
        """
        found = cls()
        found.load_state_dict(read_weights(cache_dir))
        return found

    def train(self, mode: bool = True) -> ResNet50:
        """Stay in eval mode; a module that holds this one may be put into training mode."""
        del mode
        return super().train(False)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 2048) float32."""
        images = self.checked(images).float()
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self._features(255 * images.flip(1) - self.get_buffer("mean"))

    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to logits (B, 1000) of ImageNet's classes, in order of their WordNet ids."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        x = F.relu(self._apply_layer("conv1", "bn_conv1", F.pad(x, (3, 3, 3, 3))))
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        for stage, letters in BLOCKS.items():
            for letter in letters:
                y = F.relu(self._at(stage, letter, "2a", x))
                y = F.relu(self._at(stage, letter, "2b", y))
                y = self._at(stage, letter, "2c", y)
                x = F.relu(y + (self._at(stage, letter, "1", x) if letter == "a" else x))
        return x.mean((2, 3))

    def _add(self, convolution: str, norm: str, size_in: int, size_out: int, kernel: int, stride: int) -> None:
        padding = 1 if kernel == 3 else 0  # that of the first, 7 wide, is laid on before it
        self.layers[convolution] = nn.Conv2d(size_in, size_out, kernel, stride, padding)
        self.layers[norm] = nn.BatchNorm2d(size_out, eps=NORM_EPSILON)

    def _branch(
        self, stage: int, letter: str, branch: str, size_in: int, size_out: int, kernel: int, stride: int
    ) -> None:
        end = f"{stage}{letter}_branch{branch}"
        self._add(f"res{end}", f"bn{end}", size_in, size_out, kernel, stride)

    def _at(self, stage: int, letter: str, branch: str, x: Tensor) -> Tensor:
        end = f"{stage}{letter}_branch{branch}"
        return self._apply_layer(f"res{end}", f"bn{end}", x)

    def _apply_layer(self, convolution: str, norm: str, x: Tensor) -> Tensor:
        y: Tensor = self.layers[norm](self.layers[convolution](x))
        return y
