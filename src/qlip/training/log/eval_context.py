"""Looking at a model while it trains, so that the training does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from qlip.training.log.runlog import Clock

Applied = Callable[[], AbstractContextManager[None]]
"""Enters a context in which the model computes with other weights, e.g. :meth:`qlip.training.optim.ema.EMA.applied`."""


@contextmanager
def evaluating(
    device: torch.device, clock: Clock, applied: Applied = nullcontext, model: nn.Module | None = None
) -> Iterator[None]:
    """Inside, time is no training's, random numbers are drawn aside, and the weights are the averaged ones.

    Args:
        device: of the model, whose random numbers are put back as the CPU's are.
        clock: of the log; it pauses.
        applied: around the whole.
        model: set to eval mode inside; each of its modules has its own mode back afterwards.
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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
