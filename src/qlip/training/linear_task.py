"""Base class for tasks whose losses are means over samples or tokens, such as language models.

    class NextToken(LinearTask):
        terms = {"next_token": "tokens"}          # per loss: the name of its sum, and of the count that divides it

        def counts(self, batch): ...              # {"tokens": 480}, from the labels alone
        def sums(self, batch): ...                # {"next_token": a scalar with a graph}, from the network
        def export(self, folder, weights): ...

Such losses are linear in their sums, so exact accumulation needs no first pass over the network. It costs as much as
``accumulation: mean``, and unlike the mean it is correct for samples of different lengths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from qlip.modeling.parts import ParamGroups
from qlip.training.batches import Batch
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.parallel.global_sums import global_sums
from qlip.training.recipe_schema import OptimizerSection
from qlip.training.task import Losses, LossInputs, Phase, Report, Task, Wrap, unwrapped

B = TypeVar("B", bound=Batch)


class LinearTask(Task, Generic[B]):
    """Base class of a task with one network, one phase, and losses that are means.

    Attributes:
        terms: name of each sum to the name of the count that divides it.
        model: the network; averaged (EMA) and exported.
        network: the model wrapped for distributed training; `sums` calls it.

    Args:
        model: network on its device, in training mode; frozen parameters have ``requires_grad=False``.
        optimizer: the recipe's optimizer section.
        groups: parameter groups of the model, for the optimizer.
        wrap: wraps the network for distributed training.
        part_rates: peak learning rates of parts of the model that do not use the recipe's.
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

    # ---------------------------------------------------------------- for subclasses to define

    @abstractmethod
    def counts(self, batch: B) -> Mapping[str, int]:
        """Numbers of items that the sums run over, by name, computed from the labels alone."""

    @abstractmethod
    def sums(self, batch: B) -> Mapping[str, Tensor]:
        """Scalar float32 sums with a graph, one for each of `terms`, computed by the network.

        The batch may be empty on this rank but not on others. Then still run the network, on a dummy sample, and
        multiply its sums by 0.
        """

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """See :class:`qlip.training.task.Task`."""

    def losses(self, means: Mapping[str, Tensor]) -> Losses:
        """Weighted losses from the means, by name; the default weight is 1."""
        return dict(means)

    # ---------------------------------------------------------------- as a Task

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The model, as the only network."""
        return {"model": self.model}

    @property
    def phases(self) -> Sequence[Phase]:
        """The only phase, named "model"."""
        return self._phases

    def forward(self, batch: B, cached_only: bool) -> LossInputs:
        """Sums and counts; with ``cached_only`` the network does not run, because no input is used non-linearly."""
        inputs = LossInputs(counts=dict(self.counts(batch)))
        if cached_only:
            zero = torch.zeros((), device=next(self.model.parameters()).device)
            inputs.sums = dict.fromkeys(self.terms, zero)
        else:
            inputs.sums = dict(self.sums(batch))
        return inputs

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """Losses from the means over the global batch, and the means as the report."""
        device = next(self.model.parameters()).device
        sums, counts = global_sums(inputs, device)
        means = {name: sums[name] / max(1.0, counts[count]) for name, count in self.terms.items()}
        return self.losses(means), {name: mean.detach() for name, mean in means.items()}
