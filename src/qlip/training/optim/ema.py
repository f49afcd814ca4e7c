"""Exponential moving average (EMA) of a model's weights, sharded like the weights."""

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
    """Averages the trainable floating-point parameters; frozen parameters and buffers are not duplicated.

    Args:
        module: module on its device and, with FSDP2, already sharded; the averages are sharded like it.
        decay: largest decay; after t updates the next one uses min(decay, (1 + t) / (10 + t)), to move faster early on.
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
        """Move the averages towards the weights; call after each optimizer step."""
        assert not self._in_module
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._averages:
            averages, weights = self._shards()
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module uses the averages; its weights are restored exactly on exit."""
        assert not self._in_module
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict for evaluation: averages in place of the averaged parameters."""
        assert not self._in_module
        return {**self.module.state_dict(), **self._averages}

    def state(self) -> dict[str, Tensor]:
        """Averages by parameter name, sharded like the weights, and the number of updates."""
        assert not self._in_module
        return {**self._averages, UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state`.

        Raises:
            QLIPError: if the state is of another model, or of one with other trainable parts.
        """
        if state.keys() != self._averages.keys() | {UPDATES}:
            odd = min(state.keys() ^ (self._averages.keys() | {UPDATES}))
            where = "not in the model's average" if odd in state else "missing"
            raise QLIPError(
                f"moving average: {odd!r} is {where}; it was saved with other trainable parts; start a new run"
            )
        for name, average in self._averages.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange averages and weights in place."""
        for average, weight in zip(*self._shards(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        for module in self._sharded:
            module.reshard()  # the root keeps its gathered weights after a forward pass without a backward pass
        self._in_module = not self._in_module

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Local parts of averages and weights, in the same order."""
        averages = [local(average) for average in self._averages.values()]
        return averages, [local(parameter.detach()) for parameter in self._parameters.values()]
