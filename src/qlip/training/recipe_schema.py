"""The parts of a recipe. Strict: an unknown key, or one that the chosen method does not read, is an error."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlip.modeling.parts import Part

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def only_with(section: Section, owner: str, fields: tuple[str, ...], active: bool) -> None:
    """Refuse fields that were changed although nothing reads them."""
    defaults = type(section).model_fields
    changed = [name for name in fields if getattr(section, name) != defaults[name].default]
    if changed and not active:
        raise ValueError(f"{changed[0]} is read only with {owner}; remove it")


class ModelSection(Section):
    """What is trained: a packaged config by name, or a checkpoint folder to start from.

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
        only_with(self, "init", ("fresh",), self.init is not None)
        return self


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

    @model_validator(mode="after")
    def _read(self) -> Self:
        only_with(self, "kind: siglip", ("bias",), self.kind == "siglip")
        return self


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
        if self.freeze_codes and (self.alpha_q or self.commitment):
            name = "alpha_q" if self.alpha_q else "commitment"
            raise ValueError(f"freeze_codes leaves {name} nothing to train; set losses.{name}=0")
        return self


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

    @model_validator(mode="after")
    def _read(self) -> Self:
        only_with(self, "r1", ("r1_every",), self.r1 > 0)
        only_with(self, "lecam", ("lecam_decay",), self.lecam > 0)
        only_with(self, "kind: patchgan", ("layers",), self.kind == "patchgan")
        return self


class OptimizerSection(Section):
    """AdamW, LAMB (arXiv 1904.00962), or Muon for the blocks' matrices and AdamW for the rest.

    Attributes:
        lr: peak learning rate.
        parts: peak learning rates of parts that have one of their own.
        layer_decay: factor on the rate for each layer further from a tower's output (arXiv 2106.08254); None is 1.
        weight_decay: decoupled; never on norms, biases, embeddings, temperature.
        clip: largest norm of the gradient of all that trains.
        muon_precision: of Muon's matrix products.
    """

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: Rate = 1e-3
    parts: dict[Part, Weight] = Field(default_factory=dict)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    muon_lr: Rate = 2e-3
    muon_momentum: Decay = 0.95
    muon_precision: Literal["float32", "bfloat16"] = "float32"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Weight = 0.05
    clip: Rate = 1.0

    @model_validator(mode="after")
    def _read(self) -> Self:
        only_with(self, "name: muon", ("muon_lr", "muon_momentum", "muon_precision"), self.name == "muon")
        return self


class ScheduleSection(Section):
    """Linear warm-up, then a cosine to ``floor`` times the peak."""

    steps: Count
    warmup: Steps = 0
    floor: Share = 0.0


class EMASection(Section):
    """Exponential moving average of the weights, used for evaluation, images and the exported model.

    Attributes:
        decay: largest decay; at step t it is min(decay, (1 + t) / (10 + t)), so that early averages move.
    """

    decay: Decay = 0.999


class ParallelSection(Section):
    """How ranks share the work; one process ignores all of it.

    Attributes:
        kind: ``ddp``, or ``fsdp`` (parameters, gradients and optimizer state sharded).
        shard: with fsdp, ranks that share one copy of the model (HSDP where fewer than all); None shares it over all.
        timeout: seconds a collective may take before the run ends with the rank that is missing.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    shard: Count | None = None
    timeout: Rate = 1800.0

    @model_validator(mode="after")
    def _read(self) -> Self:
        only_with(self, "kind: fsdp", ("shard",), self.kind == "fsdp")
        return self


class SpikeSection(Section):
    """Skip a step whose gradient norm is more than ``factor`` times its running mean, and say so.

    Attributes:
        factor: of the mean of the last ``window`` accepted steps.
        window: steps averaged; none is skipped before it is full.
        limit: skipped steps in a row before the run stops.
    """

    factor: Annotated[float, Field(gt=1)]
    window: Count = 100
    limit: Count = 10


class CheckpointSection(Section):
    """When to save, how many to keep, and whether the next step waits for the disk."""

    every: Count = 500
    keep: Count = 2
    asynchronous: bool = True


class LogSection(Section):
    """When to write a line, and an image of originals above reconstructions.

    Attributes:
        gradients_every: steps between probes of each term's gradient at the shared layer; 0 never.
        wandb: a Weights & Biases project; None does without.
    """

    every: Count = 50
    pictures_every: Steps = 500
    pictures: Count = 8
    gradients_every: Steps = 0
    tensorboard: bool = True
    wandb: str | None = None


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
