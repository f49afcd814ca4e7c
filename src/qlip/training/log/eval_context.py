"""Evaluation of a model during training, without side effects on the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from qlip.training.log.runlog import Clock

Applied = Callable[[], AbstractContextManager[None]]
"""Returns a context in which the model uses other weights, e.g. :meth:`qlip.training.optim.ema.EMA.applied`."""


@contextmanager
def evaluating(
    device: torch.device, clock: Clock, applied: Applied = nullcontext, model: nn.Module | None = None
) -> Iterator[None]:
    """Evaluation context: pauses the clock, restores the RNG state on exit, and swaps in the EMA weights.

    Args:
        device: device of the model; its RNG state is restored on exit, and so is the CPU's.
        clock: clock of the log, paused inside.
        applied: returns the context that swaps the weights; by default they stay.
        model: set to eval mode inside; the mode of each of its modules is restored on exit.
    """
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(clock.paused())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(applied())
        if model is not None:
            stack.enter_context(_evaluating(model))
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode inside; restore the mode of each module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
