"""What a trainer needs of a task: the seam between time (steps, files, signals, ranks) and what is learned.

A batch becomes losses in two moves. ``Phase.forward`` runs the networks on some samples and returns `LossInputs`;
``Phase.loss`` makes the losses of the whole global batch out of all of them, reducing over ranks where it must. Between
the two a batch may be cut into micro-batches, and the gradients stay exact (:mod:`qlip.training.accumulate`).
A task whose losses are sums over samples or tokens is a :class:`~qlip.training.linear_task.LinearTask`.
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
    """Makes a network run on all ranks (and compiled, where the recipe asks); the identity in one process."""

    def __call__(self, module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
        """Called before optimizers are built, for sharding replaces parameters.

        Args:
            module: runs the network in its forward.
            ignored: parameters in it whose gradients the wrapper must leave alone (see ``Phase.loss_parameters``).
        """
        ...


def unwrapped(module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
    """The wrap of a single process: the identity."""
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
        metadata: (B, ...) each, without a graph: facts known of samples beforehand, e.g. match ids; concatenated.
        counts: number of items that the sums and statistics run over, e.g. pixels and tokens; added.
    """

    embeddings: dict[str, Tensor] = field(default_factory=dict)
    mean_stats: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One update on a batch; a GAN has two.

    Attributes:
        name: of the phase, in errors.
        optimizers: stepped together; the schedule scales their groups' initial rates.
        parameters: clipped together; all that the optimizers move.
        clip: largest norm of the gradient.
        forward: samples, and whether only the inputs that a loss uses non-linearly (embeddings and mean statistics) are
            wanted, to their loss inputs. The names of ``sums`` and all ``counts`` are given either way; the values of
            sums need no graph then.
        loss: all loss inputs of this rank to the global losses and report.
        modules: run in ``forward`` and train, as wrapped for ranks; the wrapper exchanges their gradients.
        loss_parameters: parameters that ``loss`` itself uses (the temperature); no wrapper covers them, their gradients
            are averaged over ranks before the step.
        active: whether the phase runs at a step, 0 for the first.
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
    """A network that a task uses and never trains; checkpoints store its origin and fingerprint, not its weights.

    Attributes:
        network: with its weights.
        source: where the weights came from: a checkpoint folder, a Hub id, a file.
    """

    network: nn.Module
    source: str


class Task(Protocol):
    """A model and how a batch becomes losses; it knows nothing of files, signals or ranks."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Modules whose weights and buffers are saved, by name; "model" is averaged (EMA) and exported."""
        ...

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """Networks that are used and never change, by name."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """Phases in the order in which they run on each batch."""
        ...

    def before_step(self, step: int) -> None:
        """Called with the number of steps taken, before the phases, e.g. to move weights that follow a schedule."""
        ...

    def after_step(self) -> None:
        """Called after all phases of a batch, e.g. to clamp a parameter to its bounds."""
        ...

    def summary(self) -> Report:
        """Called when a line is logged: values known only over many steps (use of codes); starts a new window."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint folder that users load.

        Args:
            folder: where to.
            weights: whole tensors of the "model" network by name (the averaged ones where there is an average).
        """
        ...


@runtime_checkable
class SharedLayer(Protocol):
    """A task that can show each loss term's gradient at one layer (``log.gradients_every``)."""

    @property
    def shared_layer(self) -> nn.Parameter:
        """Weight where the gradients of all terms meet, e.g. of the last linear layer of a shared encoder."""
        ...
