"""Tasks whose losses are means over samples or tokens, such as every language model.

    class NextToken(LinearTask):
        terms = {"next_token": "tokens"}          # each loss: the name of its sum, and of the count it is divided by

        def counts(self, batch): ...              # {"tokens": 480}, from the labels alone
        def sums(self, batch): ...                # {"next_token": a scalar with a graph}, from the network
        def export(self, folder, weights): ...

Such losses are linear in their sums, so exact accumulation needs no first pass over the network: it costs as much as
``accumulation: mean`` does, and it is right for samples of different lengths, which the mean is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from qlip.modeling.parts import ParamGroups
from qlip.training.batches import Batch
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.parallel.global_sums import global_sums
from qlip.training.recipe_schema import OptimizerSection
from qlip.training.task import Frozen, Losses, LossInputs, Phase, Report, Wrap, unwrapped

B = TypeVar("B", bound=Batch)


class LinearTask(ABC, Generic[B]):
    """Base of a task with one network, one phase, and losses that are means.

    Attributes:
        terms: name of each sum to the name of the count that it is divided by.
        model: the network; it is averaged (EMA) and exported.
        network: the same as wrapped for ranks; `sums` calls it.

    Args:
        model: on its device, in training mode; parameters that do not train need no gradient.
        optimizer: of the recipe.
        groups: how the model's parameters are trained.
        wrap: makes the network run on all ranks.
        part_rates: peak learning rates of parts that have one of their own.
    """

    terms: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSection,
        groups: ParamGroups,
        wrap: Wrap = unwrapped,
        part_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.network = model, wrap(model)
        optimizers = build_optimizers(model.named_parameters(), optimizer, groups, part_rates)
        trained = [one for each in optimizers for group in each.param_groups for one in group["params"]]
        self._phases = (
            Phase(
                "model",
                optimizers,
                trained,
                optimizer.clip,
                self.forward,
                self.loss,
                (self.network,),
                equal_counts=True,
            ),
        )

    # ---------------------------------------------------------------- of a subclass

    @abstractmethod
    def counts(self, batch: B) -> Mapping[str, int]:
        """Number of items that the sums run over, by name, from the labels alone."""

    @abstractmethod
    def sums(self, batch: B) -> Mapping[str, Tensor]:
        """Scalars float32 with a graph, one for each of `terms`, from the network.

        The batch may be empty on this rank while it is not on others: run the network all the same, on a sample that is
        made up, and multiply its sums by 0.
        """

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """See :class:`qlip.training.task.Task`."""

    def losses(self, means: Mapping[str, Tensor]) -> Losses:
        """Weighted losses from the means by name; all of them with weight 1 by default."""
        return dict(means)

    # ---------------------------------------------------------------- as a Task

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The model alone."""
        return {"model": self.model}

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """No network that is only used."""
        return {}

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase."""
        return self._phases

    def forward(self, batch: B, cached_only: bool) -> LossInputs:
        """Sums and counts; the network does not run where only non-linear inputs are wanted, for there are none."""
        inputs = LossInputs(counts=dict(self.counts(batch)))
        if cached_only:
            zero = torch.zeros((), device=next(self.model.parameters()).device)
            inputs.sums = dict.fromkeys(self.terms, zero)
        else:
            inputs.sums = dict(self.sums(batch))
        return inputs

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """Means over the global batch, and the losses that `losses` makes of them."""
        device = next(self.model.parameters()).device
        sums, counts = global_sums(inputs, device)
        means = {name: sums[name] / max(1.0, counts[count]) for name, count in self.terms.items()}
        return self.losses(means), {name: mean.detach() for name, mean in means.items()}

    def before_step(self, step: int) -> None:
        """No-op."""

    def after_step(self) -> None:
        """No-op."""

    def summary(self) -> dict[str, Any]:
        """Nothing beside the means."""
        return {}
