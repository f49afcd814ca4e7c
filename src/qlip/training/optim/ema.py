"""Exponential moving average of a model's weights, shared among ranks as the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qlip.errors import QLIPError
from qlip.training.optim.clipping import local

UPDATES = "updates"


class EMA:
    """Averages the floating parameters that train; frozen ones and buffers are the module's own and not kept twice.

    Args:
        module: on its device and, with FSDP2, already sharded; its averages are sharded alike.
        decay: largest; the update after t others uses min(decay, (1 + t) / (10 + t)), so that early averages move.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._sharded = [inner for inner in module.modules() if isinstance(inner, FSDPModule)]
        self._in_module = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; called after each step."""
        assert not self._in_module
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._averages:
            averages, weights = self._shards()
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the averages inside, and has its weights back, bit by bit, afterwards."""
        assert not self._in_module
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def weights(self) -> dict[str, Tensor]:
        """The module's state as an evaluation sees it: averages by name, everything else as it is."""
        assert not self._in_module
        return {**self.module.state_dict(), **self._averages}

    def state(self) -> dict[str, Tensor]:
        """Averages by parameter name, sharded as the weights are, and the count of updates."""
        assert not self._in_module
        return {**self._averages, UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back.

        Raises:
            QLIPError: the state is of another model, or of one that trained other parts.
        """
        if state.keys() != self._averages.keys() | {UPDATES}:
            odd = min(state.keys() ^ (self._averages.keys() | {UPDATES}))
            where = "not in the model's average" if odd in state else "missing"
            raise QLIPError(f"moving average: {odd!r} is {where}; it was saved while other parts trained, start anew")
        for name, average in self._averages.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._shards(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for module in self._sharded:
            module.reshard()  # a root keeps its gathered weights after a forward pass without a backward one
        self._in_module = not self._in_module

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of averages and weights, in one order."""
        averages = [local(average) for average in self._averages.values()]
        return averages, [local(parameter.detach()) for parameter in self._parameters.values()]
