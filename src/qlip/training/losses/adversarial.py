"""L_gan: loss terms of the discriminator and the generator, and regularisers of the discriminator.

Shapes: B images; logits (B, ...) with any trailing dimensions, high for real images, averaged per image. All terms are
per-image, (B,) float32: their sums can be added over micro-batches and ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["hinge", "non_saturating"]


def on_real(logits: Tensor, kind: Kind) -> Tensor:
    """Discriminator term of real images: max(0, 1 - D) (arXiv 1705.02894), or softplus(-D) (1406.2661)."""
    logits = logits.float()
    return _per_image(F.relu(1 - logits) if kind == "hinge" else F.softplus(-logits))


def on_fake(logits: Tensor, kind: Kind) -> Tensor:
    """Discriminator term of reconstructed images: max(0, 1 + D), or softplus(D)."""
    logits = logits.float()
    return _per_image(F.relu(1 + logits) if kind == "hinge" else F.softplus(logits))


def to_fool(logits: Tensor, kind: Kind) -> Tensor:
    """Generator term: -D, or softplus(-D)."""
    logits = logits.float()
    return _per_image(-logits if kind == "hinge" else F.softplus(-logits))


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 penalty (arXiv 1801.04406, eq. 9), unweighted: half the squared norm of the logit's gradient at each image.

    Args:
        logits: logits of the images, with a graph.
        images: (B, C, H, W), real images that require a gradient.

    Returns:
        (B,), differentiable: its gradient takes a second backward pass.
    """
    total = _per_image(logits.float()).sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1) / 2


class RunningLogits(nn.Module):
    """LeCAM (arXiv 2104.03310): running means of the logits of real and reconstructed images, as a regulariser.

    The means are of earlier steps; before the first update the terms are zero.

    Args:
        decay: decay of the running means; the first update initialises them.
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        for name in ("real", "fake", "updates"):
            self.register_buffer(name, torch.zeros(()))

    def pull(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of real and reconstructed images: squared distance of the logits to the running mean of the other."""
        known = (self.updates > 0).float()
        to_fake = _per_image((real.float() - self.fake).square())
        to_real = _per_image((fake.float() - self.real).square())
        return to_fake * known, to_real * known

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Update the running means with the mean logits of a global batch, scalars."""
        share = torch.where(self.updates > 0, 1 - self.decay, 1.0)
        self.real += share * (real - self.real)
        self.fake += share * (fake - self.fake)
        self.updates += 1


def strength(step: int, start: int, warmup: int) -> float:
    """Warm-up factor of the generator term's weight: 0 until ``start``, then linear to 1 over ``warmup`` steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / warmup) if warmup else 1.0


def adaptive_factor(reconstruction: float, adversarial: float, limit: float = 1e4) -> float:
    """Factor that scales the adversarial gradient to the norm of the reconstruction gradient (arXiv 2012.09841, eq. 7).

    Args:
        reconstruction, adversarial: gradient norms at the decoder's last layer.
        limit: upper bound of the factor.
    """
    return min(limit, reconstruction / max(adversarial, 1e-12))


def priced(images: Tensor, price: Any) -> Tensor:
    """Sum of a per-image term, with its gradient computed immediately and its graph freed.

    Equal to ``price(images).sum()``, forward and backward, with respect to the images. No other leaf of the term gets a
    gradient, as needed for a frozen network or the opponent in adversarial training. The activations of the term are
    freed before the backward pass through the network that made the images begins.

    Args:
        images: (B, ...) float32, with or without a graph.
        price: function from images to a term per image, (B,).
    """
    if not (torch.is_grad_enabled() and images.requires_grad):
        return price(images).sum()  # type: ignore[no-any-return]
    leaf = images.detach().requires_grad_()
    total = price(leaf).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return with_gradient(images, total.detach(), gradient)


def with_gradient(images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    """Attach a precomputed gradient to a scalar, as a differentiable function of the images.

    Args:
        images: (B, ...), with a graph.
        total: scalar, without a graph.
        gradient: gradient of ``total`` with respect to the images, of their shape.
    """
    result: Tensor = _Known.apply(images, total, gradient)  # type: ignore[no-untyped-call]
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = images.dtype
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None


def _per_image(values: Tensor) -> Tensor:
    """Mean over all but the batch dimension, (B,)."""
    return values.flatten(1).mean(1)
