"""The second player of stage 2: a discriminator, what it minimises, and what it tells the generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qlip.data.loader.batch import Batch
from qlip.modeling.parts import BlockGroups
from qlip.training.losses.adversarial import (
    RunningLogits,
    adaptive_factor,
    gradient_penalty,
    on_fake,
    on_real,
    strength,
    to_fool,
    with_gradient,
)
from qlip.training.losses.balance import term_gradients
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.parallel.collectives import sum_over_ranks
from qlip.training.parallel.global_sums import filled, global_sums
from qlip.training.parallel.parallelize import placed
from qlip.training.recipe_schema import OptimizerSection
from qlip.training.task import Losses, LossInputs, Phase, Report, Wrap
from qlip.training.tasks.discriminators import build_discriminator
from qlip.training.tasks.recipe_schema import DiscriminatorSection

Pair = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, 3, H, W) normalised pixels to originals and what the generator makes of them, in [-1, 1], without a graph."""


class Critic(nn.Module):
    """A discriminator and what the two players ask of it, each in one forward pass, for ranks may share its weights.

    Args:
        network: (B, 3, H, W) in [-1, 1] to logits.
        settings: of the recipe.
    """

    def __init__(self, network: nn.Module, settings: DiscriminatorSection) -> None:
        super().__init__()
        self.network, self.settings = network, settings

    def forward(self, fake: Tensor, real: Tensor | None = None, penalise: bool = False) -> dict[str, Tensor]:
        """Judge images.

        Args:
            fake: (B, 3, H, W), rebuilt ones.
            real: (B, 3, H, W), originals; None where the generator asks what it pays, and how it would pay less.
            penalise: also the gradient penalty.

        Returns:
            For the discriminator ``real`` and ``fake``, logits, and ``penalty`` (B,); for the generator, without a
            graph, ``price`` (B,) and ``slope`` (B, 3, H, W), the gradient of its sum.
        """
        if real is None:
            leaf = fake.detach().requires_grad_()
            with torch.enable_grad():
                price = to_fool(self.network(leaf), self.settings.loss)
                (slope,) = torch.autograd.grad(price.sum(), leaf)
            return {"price": price.detach(), "slope": slope}
        if not penalise:
            return {"real": self.network(real), "fake": self.network(fake)}
        real = real.detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):  # squares of gradients need the digits
            logits = self.network(real)
            penalty = gradient_penalty(logits, real)
        return {"real": logits, "fake": self.network(fake), "penalty": penalty}


class DiscriminatorPlayer:
    """The discriminator's phase, and the generator's adversarial term.

    It sees the updated generator's images of the same batch: they are rebuilt again, without a graph, so
    that micro-batches need no memory for them.

    Args:
        settings: of the recipe.
        pair: makes what is to be told apart.
        size: H and W of images.
        seed: of its weights.
        wrap: makes it run on all ranks.
        device: where to.
    """

    def __init__(
        self,
        settings: DiscriminatorSection,
        pair: Pair,
        size: tuple[int, int],
        seed: int,
        wrap: Wrap,
        device: torch.device,
    ) -> None:
        self.settings, self._pair, self._device = settings, pair, device
        self.network = placed(build_discriminator(settings, size, seed), device)
        self.running = RunningLogits(settings.lecam_decay).to(device)
        self._critic = wrap(Critic(self.network, settings))
        optimizer = OptimizerSection(
            lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, clip=settings.clip
        )
        self.phase = Phase(
            "discriminator",
            build_optimizers(self.network.named_parameters(), optimizer, BlockGroups(self.network)),
            list(self.network.parameters()),
            settings.clip,
            self.forward,
            self.loss,
            (self._critic,),
            active=lambda step: step >= settings.start,
        )
        self._logits = torch.zeros(3, device=device)
        self.before_step(0)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Modules that a checkpoint stores."""
        found = {"discriminator": self.network}
        return found | {"lecam": self.running} if self.settings.lecam else found

    def before_step(self, step: int) -> None:
        """Losses of this step: a share of the generator's term, a penalty or none; no logits are counted yet."""
        settings = self.settings
        self.strength = strength(step, settings.start, settings.warmup)
        self._penalise = settings.r1 > 0 and (step - settings.start) % settings.r1_every == 0
        self._logits.zero_()  # sums of real and of fake logits, and their number, on this rank

    def after_step(self) -> None:
        """Move the running means to this step's logits."""
        if not self.settings.lecam:
            return
        real, fake, count = sum_over_ranks(self._logits).unbind()
        if count:  # the phase has run
            self.running.update(real / count, fake / count)

    # ---------------------------------------------------------------- what the generator asks

    def judge(self, rebuilt: Tensor) -> Tensor:
        """The sum over (B, 3, H, W) images in [-1, 1] of what the generator pays; its gradient goes to them alone."""
        with torch.no_grad():  # no gradient of the generator's may reach these weights, and no wrapper waits for one
            found = self._critic(rebuilt.detach())
        return with_gradient(rebuilt, found["price"].sum(), found["slope"])

    def weight(self, fidelity: Tensor, adversarial: Tensor, shared: nn.Parameter) -> Tensor:
        """Factor of the generator's term beside alpha_g.

        Args:
            fidelity, adversarial: losses of the global batch, with a graph down to ``shared`` if adaptive.
            shared: the decoder's last layer.
        """
        factor = 1.0
        if self.settings.adaptive:
            found = term_gradients({"fidelity": fidelity, "gan": adversarial}, shared)
            factor = adaptive_factor(found["norm/fidelity"], found["norm/gan"])
        return torch.tensor(self.strength * factor, device=self._device)

    # ---------------------------------------------------------------- what it minimises

    def forward(self, batch: Batch, cached_only: bool) -> LossInputs:
        """Judge originals and rebuilt images of this rank. All terms are sums, so nothing is wanted beforehand."""
        names = ["on_real", "on_fake", "logits_real", "logits_fake"]
        names += ["r1"] * self._penalise + ["lecam"] * bool(self.settings.lecam)
        inputs = LossInputs(counts={"samples": len(batch)})
        if cached_only:
            inputs.sums = dict.fromkeys(names, torch.zeros((), device=self._device))
            return inputs
        original, rebuilt = self._pair(filled(batch.pixel_values))
        found = self._critic(rebuilt, original, self._penalise)
        real, fake, kind = found["real"].float(), found["fake"].float(), self.settings.loss
        terms = {"on_real": on_real(real, kind), "on_fake": on_fake(fake, kind)}
        terms |= {"logits_real": real.detach().flatten(1).mean(1), "logits_fake": fake.detach().flatten(1).mean(1)}
        if self._penalise:
            terms["r1"] = found["penalty"]
        if self.settings.lecam:
            terms["lecam"] = torch.stack(self.running.pull(real, fake)).sum(0)
        present = int(len(batch) > 0)
        inputs.sums = {name: terms[name].sum() * present for name in names}
        self._logits += torch.stack(
            (inputs.sums["logits_real"], inputs.sums["logits_fake"], torch.full_like(self._logits[0], len(batch)))
        )
        return inputs

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """The adversarial loss and its regularisers, over the global batch."""
        settings = self.settings
        sums, counts = global_sums(inputs, self._device)
        means = {name: value / counts["samples"] for name, value in sums.items()}
        losses = {"discriminator": means.pop("on_real") + means.pop("on_fake")}
        if "r1" in means:
            losses["r1"] = settings.r1 * settings.r1_every * means["r1"]
        if "lecam" in means:
            losses["lecam"] = settings.lecam * means["lecam"]
        report = means | {"discriminator": losses["discriminator"]}
        return losses, {name: value.detach() for name, value in report.items()}
