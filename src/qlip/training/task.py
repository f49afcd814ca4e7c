"""Interface between the trainer (steps, files, signals, ranks) and a task (model, losses, optimizers).

Losses are computed in two stages. ``Phase.forward`` runs the networks on some samples and returns `LossInputs`;
``Phase.loss`` computes the losses of the global batch from the merged inputs, with reductions over ranks if needed.
Because of this split, a batch may be processed in micro-batches and still give exact gradients
(:mod:`qlip.training.accumulate`). A task whose losses are means over samples or tokens is a
:class:`~qlip.training.linear_task.LinearTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

Losses = dict[str, Tensor]
"""Weighted terms whose sum is minimised: scalars with a graph, of the global batch, equal on all ranks."""
Report = dict[str, Tensor]
"""Logged values by name: scalars without a graph, of the global batch, equal on all ranks."""


class Wrap(Protocol):
    """Wraps a network for distributed training (and compiles it if the recipe says so); the identity in one process."""

    def __call__(self, module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
        """Wrap a module; called before optimizers are built, because sharding replaces parameters.

        Args:
            module: module whose forward runs the network.
            ignored: its parameters whose gradients the wrapper must not reduce (see ``Phase.loss_parameters``).
        """
        ...


def unwrapped(module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
    """Return the module unchanged: the wrap of a single process."""
    del ignored
    return module


@dataclass
class LossInputs:
    """Contribution of some samples of this rank to the losses of the global batch.

    Attributes:
        embeddings: (B, ...) each, with a graph: one row per sample; micro-batches are concatenated.
        mean_stats: any shape, with a graph: sums over samples that a loss uses non-linearly, e.g. a mean distribution's
            numerator; micro-batches are added.
        sums: scalars with a graph: sums over samples that losses are linear in, e.g. squared errors; added.
        metadata: (B, ...) each, without a graph: per-sample values known in advance, e.g. match ids; concatenated.
        counts: numbers of items that the sums and statistics run over, e.g. pixels and tokens; added.
    """

    embeddings: dict[str, Tensor] = field(default_factory=dict)
    mean_stats: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One optimizer update on a batch; a GAN has two phases.

    Attributes:
        name: name of the phase, in errors and the log.
        optimizers: stepped together; the schedule scales the initial rates of their groups.
        parameters: all parameters of the optimizers; their gradients are clipped together.
        clip: maximum norm of the gradient.
        forward: function (samples, cached_only) -> loss inputs. With ``cached_only``, only the inputs that a loss uses
            non-linearly (embeddings and mean statistics) are needed: the names of ``sums`` and all ``counts`` must
            still be given, but the values of the sums need no graph.
        loss: function from all loss inputs of this rank to the global losses and the report.
        modules: trained modules that ``forward`` runs, wrapped for ranks; the wrapper exchanges their gradients.
        loss_parameters: parameters that ``loss`` itself uses (the temperature); no wrapper covers them, so their
            gradients are averaged over ranks before the step.
        active: function from the step (0 for the first) to True if the phase runs at it.
        equal_counts: refuse ``accumulation: mean`` for micro-batches of different counts, whose mean would be wrong.
    """

    name: str
    optimizers: Sequence[Optimizer]
    parameters: Sequence[nn.Parameter]
    clip: float
    forward: Callable[[Any, bool], LossInputs]
    loss: Callable[[LossInputs], tuple[Losses, Report]]
    modules: Sequence[nn.Module] = ()
    loss_parameters: Sequence[nn.Parameter] = ()
    active: Callable[[int], bool] = lambda step: True
    equal_counts: bool = False


@dataclass(frozen=True)
class Frozen:
    """A network that a task uses but never trains; checkpoints store its source and fingerprint, not its weights.

    Attributes:
        network: the network with its weights.
        source: origin of the weights: a checkpoint folder, a Hub id or a file.
    """

    network: nn.Module
    source: str


class Task(Protocol):
    """A model with its losses and optimizers; independent of files, signals and ranks.

    A class that inherits from it defines `networks`, `phases` and `export`, and of the rest what it needs.
    """

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Modules whose weights and buffers are saved, by name; "model" is averaged (EMA) and exported."""
        ...

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """Networks that are used but never trained, by name; none by default."""
        return {}

    @property
    def phases(self) -> Sequence[Phase]:
        """Phases, in the order in which they run on each batch."""
        ...

    def before_step(self, step: int) -> None:
        """Run before the phases, with the number of steps taken, e.g. to update loss weights that follow a schedule."""
        return

    def after_step(self) -> None:
        """Run after all phases of a batch, e.g. to clamp a parameter to its bounds."""
        return

    def summary(self) -> Report:
        """Return values accumulated since the last log line (e.g. codebook usage) and reset them."""
        return {}

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint folder that users load.

        Args:
            folder: destination.
            weights: unsharded tensors of the "model" network by name (the EMA weights if the run has an EMA).
        """
        ...


@runtime_checkable
class SharedLayer(Protocol):
    """A task with a layer at which the gradient of each loss term can be probed (``log.gradients_every``)."""

    @property
    def shared_layer(self) -> nn.Parameter:
        """Weight that all loss terms depend on, e.g. that of the last linear layer of a shared encoder."""
        ...
