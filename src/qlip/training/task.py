"""What a trainer needs of a task: the seam between time (steps, files, signals) and what is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

Losses = dict[str, Tensor]
"""Weighted terms whose sum is minimised, scalars with a graph."""
Report = dict[str, Tensor]
"""What is logged: scalars without a graph, by name."""


@dataclass(frozen=True)
class Phase:
    """One backward pass and one update; a task with two players (a GAN) has two.

    Attributes:
        name: of the phase, in errors.
        optimizers: stepped together; the schedule scales their groups' initial rates.
        parameters: what is clipped together.
        clip: largest norm of the gradient.
        losses: a batch to ``(losses, report)``.
    """

    name: str
    optimizers: Sequence[Optimizer]
    parameters: Sequence[nn.Parameter]
    clip: float
    losses: Callable[[Any], tuple[Losses, Report]]


class Task(Protocol):
    """What is trained, and how a batch becomes losses; it knows nothing of steps, files, signals or ranks."""

    @property
    def model(self) -> nn.Module:
        """What trains, or holds all that trains."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """In the order in which they run on each batch."""
        ...

    def after_step(self) -> None:
        """Called after all phases of a batch, e.g. to clamp what must stay in bounds."""
        ...

    def export(self, folder: Path) -> None:
        """Write what users load: a whole checkpoint folder."""
        ...
