"""What a trainer needs of a task: the seam between time (steps, files, signals, ranks) and what is learned.

A batch becomes losses in two moves. ``parts`` runs the networks on some images; ``combine`` makes the losses of the
whole global batch out of all their parts, reducing over ranks where it must. Between the two a batch may be cut into
micro-batches, and the gradients stay exact (:mod:`qlip.training.accumulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

Losses = dict[str, Tensor]
"""Weighted terms whose sum is minimised, scalars with a graph; of the global batch, equal on all ranks."""
Report = dict[str, Tensor]
"""What is logged: scalars without a graph, by name; of the global batch, equal on all ranks."""


class Wrap(Protocol):
    """Makes a network run on all ranks (and compiled, where the recipe says so); in one process it is the identity."""

    def __call__(self, module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
        """Called before optimizers are built, for sharding replaces parameters.

        Args:
            module: whose forward runs the network.
            ignored: parameters in it whose gradients the wrapper must leave alone (see ``Phase.combined``).
        """
        ...


def unwrapped(module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
    """The wrap of a single process."""
    del ignored
    return module


@dataclass
class Parts:
    """What some images of this rank contribute to the losses of the global batch.

    Attributes:
        rows: (B, ...) each, with a graph: one row a sample, e.g. embeddings; micro-batches are concatenated.
        pools: any shape, with a graph: sums over samples that a loss uses non-linearly, e.g. a mean distribution's
            numerator; micro-batches are added.
        sums: scalars with a graph: sums over samples that losses are linear in, e.g. squared errors; added.
        facts: (B, ...) each, without a graph: what is known of samples beforehand, e.g. match ids; concatenated.
        counts: numbers of what the sums and pools run over, e.g. pixels and tokens; added.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    pools: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One update on a batch; a task with two players (a GAN) has two.

    Attributes:
        name: of the phase, in errors.
        optimizers: stepped together; the schedule scales their groups' initial rates.
        parameters: what is clipped together, and all that the optimizers move.
        clip: largest norm of the gradient.
        parts: samples, and whether only what a loss uses non-linearly (rows and pools) is wanted, to their parts. The
            names of ``sums`` and all ``counts`` are given either way; their values need no graph then.
        combine: all parts of this rank to the global losses and report.
        modules: what runs in ``parts`` and trains, as wrapped for ranks; its gradients are exchanged by the wrapper.
        combined: parameters that ``combine`` itself uses (the temperature); no wrapper covers them, their gradients are
            averaged over ranks by whoever steps.
        active: whether the phase runs at a step, 0 for the first.
    """

    name: str
    optimizers: Sequence[Optimizer]
    parameters: Sequence[nn.Parameter]
    clip: float
    parts: Callable[[Any, bool], Parts]
    combine: Callable[[Parts], tuple[Losses, Report]]
    modules: Sequence[nn.Module] = ()
    combined: Sequence[nn.Parameter] = ()
    active: Callable[[int], bool] = lambda step: True


class Task(Protocol):
    """What is trained, and how a batch becomes losses; it knows nothing of steps' files, signals or ranks."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Everything with weights or buffers to save, by name; "model" is the tokenizer."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """In the order in which they run on each batch."""
        ...

    @property
    def shared_layer(self) -> nn.Parameter:
        """Where the terms' gradients meet: the weight of the last linear layer of the shared part."""
        ...

    def before_step(self, step: int) -> None:
        """Called with the number of steps taken, before the phases, e.g. to move what follows a schedule."""
        ...

    def after_step(self) -> None:
        """Called after all phases of a batch, e.g. to clamp what must stay in bounds."""
        ...

    def summary(self) -> Report:
        """Called when a line is logged: what is known only over many steps (use of codes); starts a new window."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what users load, a whole checkpoint folder.

        Args:
            folder: where to.
            weights: whole tensors of the "model" network by name (the averaged ones where there is an average).
        """
        ...
