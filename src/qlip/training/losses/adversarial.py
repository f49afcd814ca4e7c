"""L_gan: what a discriminator and a generator pay, and what keeps the discriminator in check.

Shapes: B images, logits (B, ...) of any further shape, high for real; an image's logit is the mean of its own. All
terms are (B,) float32, one an image: sums of them may be added over micro-batches and ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["hinge", "non_saturating"]


def on_real(logits: Tensor, kind: Kind) -> Tensor:
    """The discriminator's term of real images: max(0, 1 - D) (arXiv 1705.02894), or softplus(-D) (1406.2661)."""
    logits = logits.float()
    return _a_picture(F.relu(1 - logits) if kind == "hinge" else F.softplus(-logits))


def on_fake(logits: Tensor, kind: Kind) -> Tensor:
    """The discriminator's term of rebuilt images: max(0, 1 + D), or softplus(D)."""
    logits = logits.float()
    return _a_picture(F.relu(1 + logits) if kind == "hinge" else F.softplus(logits))


def to_fool(logits: Tensor, kind: Kind) -> Tensor:
    """The generator's term: -D, or softplus(-D)."""
    logits = logits.float()
    return _a_picture(-logits if kind == "hinge" else F.softplus(-logits))


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """R1 (arXiv 1801.04406, eq. 9) without its weight: half the squared length of the logit's gradient at an image.

    Args:
        logits: of the images, with a graph.
        images: (B, C, H, W), real ones, that need a gradient.

    Returns:
        (B,), with a graph of its own: its gradient takes a second backward pass.
    """
    total = _a_picture(logits.float()).sum()
    (gradient,) = torch.autograd.grad(total, pictures, create_graph=True)
    return gradient.float().square().flatten(1).sum(1) / 2


class RunningLogits(nn.Module):
    """LeCAM (arXiv 2104.03310): running means of the logits of real and of rebuilt images, and the pull to them.

    The means are those of earlier steps; before the first update there are none, and nothing is pulled.

    Args:
        decay: of the means; the first update sets them.
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
        """The terms of real and of rebuilt images: squared distances of their logits to the other kind's mean."""
        known = (self.updates > 0).float()
        to_fake = _a_picture((real.float() - self.fake).square())
        to_real = _a_picture((fake.float() - self.real).square())
        return to_fake * known, to_real * known

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the means to those of a global batch, scalars."""
        share = torch.where(self.updates > 0, 1 - self.decay, 1.0)
        self.real += share * (real - self.real)
        self.fake += share * (fake - self.fake)
        self.updates += 1


def strength(step: int, start: int, warmup: int) -> float:
    """How much of its weight the generator's term has: 0 until ``start``, then rising over ``warmup`` steps to 1."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / warmup) if warmup else 1.0


def adaptive_factor(reconstruction: float, adversarial: float, limit: float = 1e4) -> float:
    """What makes the adversarial gradient as long as the reconstruction's (arXiv 2012.09841, eq. 7).

    Args:
        reconstruction, adversarial: lengths at the decoder's last layer.
        limit: of the factor.
    """
    return min(limit, reconstruction / max(adversarial, 1e-12))


def priced(pictures: Tensor, price: Any) -> Tensor:
    """The sum of a term over images, its gradient taken at once and the graph behind it dropped.

    Equal to ``price(images).sum()``, forward and backward, as far as the images go; no other leaf of the term gets
    a gradient, which is how a frozen network, or the other player's, judges an image. Its activations are gone before
    the backward pass of what made the images begins.

    Args:
        images: (B, ...) float32, with or without a graph.
        price: images to (B,).
    """
    if not (torch.is_grad_enabled() and pictures.requires_grad):
        return price(pictures).sum()  # type: ignore[no-any-return]
    leaf = pictures.detach().requires_grad_()
    total = price(leaf).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return with_gradient(pictures, total.detach(), gradient)


def with_gradient(pictures: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    """A number that is known to have a gradient at images, as a function of them.

    Args:
        images: (B, ...), with a graph.
        total: scalar, without one.
        gradient: of the images' shape.
    """
    result: Tensor = _Known.apply(pictures, total, gradient)  # type: ignore[no-untyped-call]
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pictures: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = pictures.dtype
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None


def _a_picture(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
