"""Stage 2's second player: tells rebuilt images from real ones.

Shapes: B images of H x W pixels, in [-1, 1] as the literature has them, so that its penalty weights mean the same.

Neither network mixes images the way batch normalisation does: its statistics would differ with the cut of a batch
into ranks and micro-batches, and betray by themselves whether a batch is real. Spectral norms are out too: each forward
pass moves their state, so that two micro-batches would not be one batch. PatchGAN has group norms, which know one
image at a time and no state; the StyleGAN kind has no norms at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.training.tasks.recipe_schema import DiscriminatorSection

SLOPE = 0.2
"""Slope of leaky ReLUs for negative numbers, in both papers."""
GROUP_CHANNELS = 16
STDDEV_GROUP = 4
"""Images that share a minibatch deviation (arXiv 1912.04958)."""
MAX_WIDENING = 8
"""Channels grow to this many times those of the first layer."""


def build_discriminator(settings: DiscriminatorSection, size: tuple[int, int], seed: int) -> nn.Module:
    """The network of a recipe, (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), high for real.

    Args:
        settings: of the recipe.
        size: H and W that it will see.
        seed: of its weights, which are the same on all ranks.

    Raises:
        QLIPError: the images are too small for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.kind == "patchgan":
            return PatchDiscriminator(settings.channels, settings.layers, size)
        return ResidualDiscriminator(settings.channels, size)


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): a logit for each of many overlapping patches, by 4 x 4 convolutions.

    Args:
        channels: of the first layer; they double with each of the next, up to 8 times.
        layers: that halve the image.
        size: H and W, to refuse what is too small.
    """

    def __init__(self, channels: int = 64, layers: int = 3, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        smallest = 3 * 2**layers
        if size is not None and min(size) < smallest:
            raise QLIPError(
                f"discriminator.layers: {layers} leave nothing of {size[0]} x {size[1]} pixels, they take"
                f" {smallest} or more; lower it"
            )
        widths = [channels * min(2**number, MAX_WIDENING) for number in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number, (size_in, size_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if number < layers else 1
            modules += [
                nn.Conv2d(size_in, size_out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(size_out, max(1, size_out // GROUP_CHANNELS)), size_out),
                nn.LeakyReLU(SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*modules)
        for module in _convolutions(self):  # as the paper has it
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1, h, w)."""
        return self.layers(images)  # type: ignore[no-any-return]


class ResidualDiscriminator(nn.Module):
    """StyleGAN2's discriminator (arXiv 1912.04958, fig. 7c): residual blocks, then one logit an image.

    Downsampling is average pooling, where the paper blurs first: an image's tokens are patches, and the edges between
    them are what this network is to see. Any size is taken: blocks halve it until 4 to 7 pixels are left, and those are
    pooled to 4.

    The minibatch deviation is that of :data:`STDDEV_GROUP` images in a row, the last ones in a smaller group, so a
    batch cut into micro-batches at multiples of it is the same batch.

    Args:
        channels: of the first layer; they double with each block, up to 8 times.
        size: H and W, which give the number of blocks.
    """

    def __init__(self, channels: int = 64, size: tuple[int, int] = (256, 256)) -> None:
        super().__init__()
        if min(size) < 8:
            raise QLIPError(f"discriminator.kind=stylegan takes images of 8 x 8 pixels or more, got {size}")
        num_blocks = int(math.log2(min(size) / 4))
        widths = [channels * min(2**number, MAX_WIDENING) for number in range(num_blocks + 1)]
        self.from_rgb = nn.Conv2d(3, widths[0], 1)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.last = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.hidden = nn.Linear(16 * widths[-1], widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for module in _convolutions(self):
            nn.init.kaiming_normal_(module.weight, SLOPE)
        nn.init.kaiming_normal_(self.logit.weight, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1, 1, 1)."""
        x = self.blocks(F.leaky_relu(self.from_rgb(images), SLOPE))
        x = F.leaky_relu(self.last(with_deviation(F.adaptive_avg_pool2d(x, 4))), SLOPE)
        logits: Tensor = self.logit(F.leaky_relu(self.hidden(x.flatten(1)), SLOPE))
        return logits[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a 1 x 1 one, both pooled to half the size; their sum keeps its variance."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(size_in, size_in, 3, padding=1)
        self.second = nn.Conv2d(size_in, size_out, 3, padding=1)
        self.skip = nn.Conv2d(size_in, size_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H // 2, W // 2)."""
        inner = F.leaky_relu(self.second(F.leaky_relu(self.first(x), SLOPE)), SLOPE)
        total: Tensor = F.avg_pool2d(inner, 2) + self.skip(F.avg_pool2d(x, 2))
        return total * 2**-0.5


def with_deviation(x: Tensor, group: int = STDDEV_GROUP) -> Tensor:
    """Add a channel with the mean over features of the deviation within each group of images.

    Args:
        x: (B, C, H, W).
        group: images in a row that are one group; the last group holds what is left.

    Returns:
        (B, C + 1, H, W).
    """
    deviations = [
        ((some - some.mean(0)).square().mean(0) + 1e-8).sqrt().mean().expand(len(some), 1, *x.shape[2:])
        for some in x.float().split(group)
    ]
    return torch.cat((x, torch.cat(deviations).to(x.dtype)), 1)


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    """Its convolutions and linear layers, their biases set to 0."""
    for one in module.modules():
        if isinstance(one, nn.Conv2d | nn.Linear):
            if one.bias is not None:
                nn.init.zeros_(one.bias)
            yield one
