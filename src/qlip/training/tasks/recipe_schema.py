"""Sections of a tokenizer's recipe: model, vocabulary, losses, discriminator, validation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlip.modeling.parts import Part
from qlip.training.recipe_schema import (
    Count,
    Decay,
    LogSection,
    OptimizerSection,
    Rate,
    Section,
    Steps,
    Weight,
)


class ModelSection(Section):
    """Model to train: a packaged config by name, or a checkpoint folder to start from.

    Attributes:
        config: a packaged configuration; all weights are random.
        init: a checkpoint folder, a Hub id, or ``bundled``. Stage 2 starts from stage 1's.
        fresh: with ``init``, the parts that start from random weights all the same.
        locked: the parts that do not train (a locked tower, arXiv 2111.07991).
    """

    config: str | None = None
    init: str | None = None
    fresh: tuple[Part, ...] = ()
    locked: tuple[Part, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.config is None) == (self.init is None):
            raise ValueError("give either config (a packaged configuration's name) or init (a checkpoint)")
        return self

    def unread(self) -> dict[str, str]:
        """``fresh``, where all weights are random."""
        return {"fresh": "init"} if self.init is None else {}


class VocabularySection(Section):
    """The text side's vocabulary, trained on the recipe's own captions before the first step."""

    size: Annotated[int, Field(ge=514)] = 2048


class Ramp(Section):
    """A number that moves linearly from ``start`` to ``end`` over the first ``steps`` steps, then stays."""

    start: Weight
    end: Weight
    steps: Count

    def at(self, step: int) -> float:
        """The value at a step, 0 for the first."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


class EntropySection(Section):
    """The quantisation loss (eq. 1): ``persample`` S - ``codebook`` H, over the inverse temperature.

    Attributes:
        estimator: of both entropies: ``group`` (joint distribution of a group's bits) or ``bit`` (marginals);
            the model configuration's where None.
        persample: weight of the per-sample entropy, a number or a ramp; the configuration's gamma_0 where None.
        codebook: weight of the codebook entropy (gamma), a number or a ramp; the configuration's gamma_1 where None.
    """

    estimator: Literal["group", "bit"] | None = None
    persample: Weight | Ramp | None = None
    codebook: Weight | Ramp | None = None


class AlignSection(Section):
    """The alignment loss.

    Attributes:
        kind: ``infonce`` (symmetric, over the global batch) or ``siglip`` (a sigmoid a pair, arXiv 2303.15343).
        share_targets: pairs of equal meaning (equal captions, or one class) are positives of each other.
        chunk_size: rows of logits that exist at a time; None makes the whole table.
        max_logit_scale: bound of the inverse temperature.
        bias: siglip's initial bias, learned.
    """

    kind: Literal["infonce", "siglip"] = "infonce"
    share_targets: bool = True
    chunk_size: Count | None = None
    max_logit_scale: Rate = 100.0
    bias: float = -10.0

    def unread(self) -> dict[str, str]:
        """``bias``, with InfoNCE."""
        return {} if self.kind == "siglip" else {"bias": "kind: siglip"}


def _some_weight(losses: Section, *names: str) -> None:
    """Raise ValueError if all weights are 0."""
    if not any(getattr(losses, name) for name in names):
        raise ValueError(f"every weight is 0, so nothing would be trained; give one of {', '.join(names)} a weight")


ENTROPIES = ("entropy.persample", "entropy.codebook")
"""Weights within alpha_q's term."""
Balance = Literal["fixed", "gradient_norm", "uncertainty"]
"""How the terms' weights come about: the recipe's; scaled so that gradient norms at the shared layer agree with them
(arXiv 2012.09841's adaptive weight, term by term); or learned from each term's uncertainty (arXiv 1705.07115)."""


class Stage1Losses(Section):
    """Weights of stage 1's total: alpha_r L_mse + alpha_q L_bsq + alpha_a L_align (the paper's section 3)."""

    alpha_r: Weight = 1000.0
    alpha_q: Weight = 1.0
    alpha_a: Weight = 1.0
    commitment: Weight = 0.0
    balance: Balance = "fixed"
    entropy: EntropySection = EntropySection()
    align: AlignSection = AlignSection()

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        _some_weight(self, "alpha_r", "alpha_q", "alpha_a", "commitment")
        return self

    def unweighted(self) -> dict[str, str]:
        """Settings of alignment and of entropies, each without its weight."""
        found = {} if self.alpha_a else {"align": "losses.alpha_a"}
        return found if self.alpha_q else found | dict.fromkeys(ENTROPIES, "losses.alpha_q")


class Stage2Losses(Section):
    """Weights of stage 2's total: alpha_r L_mse + alpha_q L_bsq + alpha_p L_lpips + alpha_g L_gan.

    Attributes:
        freeze_codes: ``quant_embed`` does not train either, so that stage 1's tokens stay valid; alpha_q must be 0.
    """

    alpha_r: Weight = 1.0
    alpha_q: Weight = 1.0
    alpha_p: Weight = 0.1
    alpha_g: Weight = 0.1
    commitment: Weight = 0.0
    freeze_codes: bool = False
    entropy: EntropySection = EntropySection()

    @model_validator(mode="after")
    def _codes_move_or_not(self) -> Self:
        _some_weight(self, "alpha_r", "alpha_q", "alpha_p", "alpha_g", "commitment")
        if self.freeze_codes and (self.alpha_q or self.commitment):
            name = "alpha_q" if self.alpha_q else "commitment"
            raise ValueError(f"freeze_codes leaves {name} nothing to train; set losses.{name}=0")
        return self

    def unweighted(self) -> dict[str, str]:
        """Settings of entropies, without their weight."""
        found = {} if self.alpha_q else dict.fromkeys(ENTROPIES, "losses.alpha_q")
        scored = self.alpha_q or self.commitment
        return found if scored else found | {"entropy.estimator": "losses.alpha_q"}


class DiscriminatorSection(Section):
    """Stage 2's second player; read only where alpha_g is not 0.

    Attributes:
        kind: ``patchgan`` (arXiv 1611.07004) or ``stylegan`` (residual blocks with minibatch deviation, 1912.04958).
        channels: of its first layer.
        layers: of patchgan.
        loss: ``hinge`` or ``non_saturating``.
        lr, betas, weight_decay, clip: of its AdamW.
        start: steps before it takes part; the generator sees no adversarial term until then.
        warmup: steps over which the generator's adversarial term rises after ``start``.
        r1: weight of the gradient penalty on real images (arXiv 1801.04406); 0 leaves it out.
        r1_every: steps between penalties (its weight is multiplied by it, lazy regularisation).
        lecam: weight of LeCAM regularisation (arXiv 2104.03310); 0 leaves it out.
        lecam_decay: of its running means.
        adaptive: scale alpha_g so that the adversarial gradient at the decoder's last layer is as large as the
            reconstruction's (arXiv 2012.09841); the published weight is fixed.
    """

    kind: Literal["patchgan", "stylegan"] = "patchgan"
    channels: Count = 64
    layers: Count = 3
    loss: Literal["hinge", "non_saturating"] = "hinge"
    lr: Rate = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Weight = 0.05
    clip: Rate = 1.0
    start: Steps = 0
    warmup: Steps = 0
    r1: Weight = 0.0
    r1_every: Count = 16
    lecam: Weight = 0.0
    lecam_decay: Decay = 0.999
    adaptive: bool = False

    def unread(self) -> dict[str, str]:
        """``layers``, of patchgan alone."""
        return {} if self.kind == "patchgan" else {"layers": "kind: patchgan"}

    def unweighted(self) -> dict[str, str]:
        """Settings of the two regularisations, each without its weight."""
        found = {} if self.r1 else {"r1_every": "discriminator.r1"}
        return found if self.lecam else found | {"lecam_decay": "discriminator.lecam"}


class ValidationSection(Section):
    """Held-out figures during training, by the code that evaluates.

    Attributes:
        every: steps between them.
        sets: public sets and splits (``cifar10:test``) or paths; each is rebuilt, and named where it has labels.
        limit: images of each.
        templates: prompts for naming.
    """

    every: Count
    sets: Annotated[tuple[str, ...], Field(min_length=1)]
    limit: Count = 1000
    templates: str = "cifar"


class TokenizerOptimizerSection(OptimizerSection):
    """Optimizer with learning rates of their own for parts of the model.

    Attributes:
        parts: peak learning rates of parts that have one of their own; 0 keeps a part from training.
    """

    parts: dict[Part, Weight] = Field(default_factory=dict)


class TokenizerLogSection(LogSection):
    """Log with images of originals above reconstructions.

    Attributes:
        images_every: steps between two such images; 0 never.
        images: number of originals in it.
    """

    images_every: Steps = 500
    images: Count = 8
