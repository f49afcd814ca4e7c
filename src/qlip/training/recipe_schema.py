"""Sections of a recipe that any kind of training has, and `RunRecipe`, which holds them.

Strict: an unknown key, or one that the chosen method does not read, is an error.
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
    """Strict base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def only_with(section: Section, owner: str, fields: tuple[str, ...], active: bool) -> None:
    """Refuse fields that were changed although nothing reads them."""
    defaults = type(section).model_fields
    changed = [name for name in fields if getattr(section, name) != defaults[name].default]
    if changed and not active:
        raise ValueError(f"{changed[0]} is read only with {owner}; remove it")


class OptimizerSection(Section):
    """AdamW, LAMB (arXiv 1904.00962), or Muon for the blocks' matrices and AdamW for the rest.

    Attributes:
        lr: peak learning rate.
        layer_decay: factor on the rate for each layer further from a tower's output (arXiv 2106.08254); None is 1.
        weight_decay: decoupled; never on norms, biases, embeddings, temperature.
        clip: largest norm of the gradient of all that trains.
        muon_precision: of Muon's matrix products.
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
    """When to save, how many checkpoints to keep, and whether the next step waits for the disk.

    Attributes:
        export: ``always`` exports the model with each checkpoint, so that each can be loaded; ``last`` only at the end
            of the run: a checkpoint then holds each weight once, and saving needs no memory for the whole model.
    """

    every: Count = 500
    keep: Count = 2
    asynchronous: bool = True
    export: Literal["always", "last"] = "always"


class LogSection(Section):
    """When to write a line, and where to.

    Attributes:
        gradients_every: steps between probes of each loss term's gradient at the shared layer; 0 never.
        wandb: a Weights & Biases project; None does without.
    """

    every: Count = 50
    gradients_every: Steps = 0
    tensorboard: bool = True
    wandb: str | None = None


class RunRecipe(Section):
    """Settings that every kind of training has; a kind adds its model, data and losses in a subclass.

    Attributes:
        name: of the run, in the log.
        task: kind of training: ``stage1``, ``stage2``, or the name of an entry point of the group ``qlip.tasks``.
        batch_size: samples per step, over all ranks.
        micro_batch_size: samples that a rank holds at a time; None takes its whole share of the batch at once.
        accumulation: of micro-batches: ``exact`` gives the gradients of the whole batch, negatives and entropies
            included, in two passes (GradCache, arXiv 2101.06983); ``mean`` averages micro-batches that know nothing of
            each other, in one.
        precision: ``bfloat16`` is autocast, with float32 where digits count.
        compile: torch.compile of the model's blocks.
        activation_checkpointing: keep only each block's input.
        threads: of the CPU, per process; None leaves it to PyTorch.
        skip_limit: number of samples that cannot be read and are skipped, before the run stops with an error.
    """

    FREE: ClassVar[tuple[str, ...]] = ("checkpoint", "log", "parallel", "skip_limit")
    """Dotted keys that may change when a run is resumed, for they change no weight."""

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
    skip_limit: Steps = 100

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
