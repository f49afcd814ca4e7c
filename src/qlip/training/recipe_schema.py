"""Sections of a recipe that every kind of training shares, and `RunRecipe`, which contains them.

Strict: an unknown key is an error, and so is a key that the chosen method does not use.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base class of every section of a recipe: immutable; unknown keys are errors, and so are keys of `unread`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def unread(self) -> dict[str, str]:
        """Dotted keys that nothing reads with these settings, and what would read each; errors unless at default."""
        return {}

    def unweighted(self) -> dict[str, str]:
        """Dotted keys without effect because of a weight of 0, and that weight; noted, so that one weight can be 0."""
        return {}

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        for key, reader in self.unread().items():
            if is_set(self, key):
                raise ValueError(f"{key} is used only with {reader}; remove it, or give it its default")
        return self


def is_set(section: BaseModel, key: str) -> bool:
    """Return True if a dotted key of a section differs from its default; an entry of a mapping, if it is not 0."""
    name, _, rest = key.partition(".")
    value = getattr(section, name)
    if isinstance(value, dict):
        return bool(value.get(rest))
    if rest and value is not None:
        return is_set(value, rest)
    return bool(value != type(section).model_fields[name].get_default(call_default_factory=True))


def without_effect(section: Section) -> dict[str, str]:
    """Dotted keys of `Section.unread` and `Section.unweighted`, of a section and all below it, and the reasons."""
    found = section.unread() | section.unweighted()
    for name, value in section:
        if isinstance(value, Section):
            found |= {f"{name}.{key}": reason for key, reason in without_effect(value).items()}
    return found


class OptimizerSection(Section):
    """AdamW, LAMB (arXiv 1904.00962), or Muon for the blocks' matrices and AdamW for the rest.

    Attributes:
        lr: peak learning rate.
        layer_decay: learning-rate factor per layer of distance from a tower's output (arXiv 2106.08254); None is 1.
        weight_decay: decoupled; not applied to norms, biases and the temperature, nor, except with LAMB, to embeddings.
        decay_embeddings: apply it to embeddings with the other optimizers too, as LlamaGen does.
        clip: maximum norm of the gradient over all trained parameters.
        muon_precision: dtype of Muon's matrix products.
    """

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: Rate = 1e-3
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    muon_lr: Rate = 2e-3
    muon_momentum: Decay = 0.95
    muon_precision: Literal["float32", "bfloat16"] = "float32"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: Weight = 0.05
    decay_embeddings: bool = False
    clip: Rate = 1.0

    def unread(self) -> dict[str, str]:
        """Settings of Muon with another optimizer, and what LAMB does anyway."""
        keys = ("muon_lr", "muon_momentum", "muon_precision")
        found = {} if self.name == "muon" else dict.fromkeys(keys, "name: muon")
        return found | ({"decay_embeddings": "name: adamw or muon"} if self.name == "lamb" else {})


class ScheduleSection(Section):
    """Learning-rate schedule: linear warm-up, then a cosine down to ``floor`` times the peak."""

    steps: Count
    warmup: Steps = 0
    floor: Share = 0.0


class EMASection(Section):
    """Exponential moving average of the weights, used for evaluation, images and the exported model.

    Attributes:
        decay: maximum decay; at step t it is min(decay, (1 + t) / (10 + t)), so that the average adapts fast at first.
    """

    decay: Decay = 0.999


class ParallelSection(Section):
    """Distributed training; ignored by a single process.

    Attributes:
        kind: ``ddp``, or ``fsdp`` (parameters, gradients and optimizer state sharded).
        shard: with fsdp, number of ranks that one copy of the model is sharded over (HSDP if fewer than all); None for
            all ranks.
        timeout: seconds that a collective may take; the run then ends with an error that names the missing rank.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    shard: Count | None = None
    timeout: Rate = 1800.0

    def unread(self) -> dict[str, str]:
        """``shard``, with ddp."""
        return {} if self.kind == "fsdp" else {"shard": "kind: fsdp"}


class SpikeSection(Section):
    """Skip, with a log line, each step whose gradient norm is more than ``factor`` times its running mean.

    Attributes:
        factor: multiple of the mean over the last ``window`` accepted steps.
        window: number of steps averaged; no step is skipped until it is full.
        limit: number of consecutive skipped steps after which the run stops.
    """

    factor: Annotated[float, Field(gt=1)]
    window: Count = 100
    limit: Count = 10


class CheckpointSection(Section):
    """Checkpoint interval, number of checkpoints to keep, and how they are written.

    Attributes:
        every: steps between checkpoints.
        keep: number of checkpoints kept, the newest ones.
        asynchronous: write in a background thread; training waits only for the copy to the CPU.
        export: ``always`` exports the model with each checkpoint, so that each can be loaded; ``last`` exports only at
            the end of the run: a checkpoint then stores each weight once, and no rank holds the whole model to save it.
    """

    every: Count = 500
    keep: Count = 2
    asynchronous: bool = True
    export: Literal["always", "last"] = "always"


class LogSection(Section):
    """Log interval and destinations.

    Attributes:
        every: steps between log lines.
        gradients_every: steps between probes of each loss term's gradient at the shared layer; 0 disables them.
        tensorboard: also write TensorBoard event files.
        wandb: name of a Weights & Biases project; None disables it.
    """

    every: Count = 50
    gradients_every: Steps = 0
    tensorboard: bool = True
    wandb: str | None = None


class RunRecipe(Section):
    """Settings that every kind of training shares; subclasses add model, data and losses.

    Attributes:
        name: name of the run, in the log.
        task: kind of training: ``stage1``, ``stage2``, or the name of an entry point of the group ``qlip.tasks``.
        batch_size: samples per step, over all ranks.
        micro_batch_size: samples per forward pass of a rank; None processes the rank's whole share at once.
        accumulation: gradients from micro-batches: ``exact`` gives those of the whole batch, including negatives and
            entropies, in two passes (GradCache, arXiv 2101.06983); ``mean`` averages independent micro-batches, in one.
        precision: ``bfloat16`` is autocast, with float32 for numerically sensitive operations.
        compile: apply torch.compile to the model's blocks.
        activation_checkpointing: store only the input of each block and recompute the rest in the backward pass.
        threads: CPU threads per process; None keeps PyTorch's default.
        skip_limit: largest number of different unreadable images (or other samples), beyond which the run stops with an
            error; below 1 a share of the samples read, of which 100 images are always tolerated.
    """

    FREE: ClassVar[tuple[str, ...]] = ("checkpoint", "log", "parallel", "skip_limit")
    """Dotted keys that may change when a run is resumed, because they do not affect the weights."""

    name: str
    task: str
    seed: int = 0
    batch_size: Count
    micro_batch_size: Count | None = None
    accumulation: Literal["exact", "mean"] = "exact"
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    ema: EMASection | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: ParallelSection = ParallelSection()
    spikes: SpikeSection | None = None
    threads: Count | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    skip_limit: Steps | Share = 0.01

    @property
    def notes(self) -> list[str]:
        """Lines about settings that are valid but probably a mistake; printed when the run starts."""
        by_weight: dict[str, list[str]] = {}
        for key, weight in without_effect(self).items():
            if is_set(self, key):
                by_weight.setdefault(weight, []).append(key)
        found = [f"{weight} is 0: no effect of {', '.join(keys)}" for weight, keys in by_weight.items()]
        steps, warmup = self.schedule.steps, self.schedule.warmup
        if warmup > steps:
            share = f"{100 * steps / warmup:.2g}%"
            found.append(
                f"schedule.warmup {warmup:,} is longer than the run: learning rates end at {share} of their peaks"
            )
        return found

    def unread(self) -> dict[str, str]:
        """``accumulation``, without micro-batches."""
        return {"accumulation": "micro_batch_size"} if self.micro_batch_size is None else {}

    def to_yaml(self) -> str:
        """Resolved recipe as YAML, with all default values."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
