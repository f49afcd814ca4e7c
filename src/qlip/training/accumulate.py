"""Exact gradients of a global batch, processed at once or in micro-batches.

A contrastive batch that is split into micro-batches needs two passes (GradCache, arXiv 2101.06983). The first pass runs
the networks without a graph and keeps the inputs that losses use non-linearly: embeddings, and the sums behind
entropies of mean distributions. The gradients of the losses with respect to these inputs are then computed. The second
pass runs each micro-batch again with a graph and backpropagates these gradients, together with the loss terms that are
sums over samples. The RNG state is replayed, so both passes use the same dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.runtime.rng import restore_rng_state, rng_state
from qlip.training.parallel.unused_params import backward_through_unused
from qlip.training.task import Losses, LossInputs, Phase, Report

Sync = Callable[[bool], AbstractContextManager[Any]]
"""Context of a backward pass; its argument is True if ranks exchange gradients in it (the last one of a phase)."""


@dataclass(frozen=True)
class Gradients:
    """Losses and report of a backward pass; the gradients themselves are in the parameters' ``grad``.

    Attributes:
        losses: weighted terms, detached.
        report: values to log.
    """

    losses: Losses
    report: Report

    @property
    def total(self) -> Tensor:
        """Sum of the losses."""
        return torch.stack(list(self.losses.values())).sum()


Inspect = Callable[[Losses], Report]
"""Computes values to log from the weighted terms before their graph is freed, e.g. the gradient of each term."""


def backward(
    phase: Phase,
    batches: Sequence[Any],
    exact: bool = True,
    sync: Sync = lambda last: nullcontext(),
    inspect: Inspect | None = None,
) -> Gradients:
    """Accumulate the gradients of a batch in the parameters.

    Args:
        phase: the phase whose losses are minimised.
        batches: micro-batches, equally many on every rank; a single one is the rank's whole share.
        exact: compute the gradients of the whole batch, in two passes; otherwise average those of the micro-batches.
        sync: entered around each backward pass.
        inspect: its report is added to the phase's; with several micro-batches it is called on the first, in an extra
            pass.
    """
    if len(batches) == 1:
        with sync(True):
            inputs = phase.forward(batches[0], False)
            losses, report = phase.loss(inputs)
            if inspect is not None:
                report = report | inspect(losses)
            backward_through_unused(torch.stack(list(losses.values())).sum(), inputs, phase.modules)
        return Gradients(detached(losses), report)
    if inspect is not None:
        inspected = inspect(phase.loss(phase.forward(batches[0], False))[0])
        result = backward(phase, batches, exact, sync)
        return Gradients(result.losses, result.report | inspected)
    return _two_passes(phase, batches, sync) if exact else _mean(phase, batches, sync)


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detach each tensor from its graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _mean(phase: Phase, batches: Sequence[Any], sync: Sync) -> Gradients:
    """Average the gradients of separate micro-batches; a term that a micro-batch lacks (no captions) counts as zero."""
    losses: Losses = {}
    report: Report = {}
    first: dict[str, int] = {}
    for number, batch in enumerate(batches, 1):
        with sync(number == len(batches)):
            inputs = phase.forward(batch, False)
            if phase.equal_counts and inputs.counts != (first := first or inputs.counts):
                raise QLIPError(
                    f"accumulation: mean averages micro-batches of different counts ({_listed(first)} and"
                    f" {_listed(inputs.counts)}), which gives wrong gradients; set accumulation=exact"
                )
            terms, values = phase.loss(inputs)
            backward_through_unused(torch.stack(list(terms.values())).sum() / len(batches), inputs, phase.modules)
        for total, new in ((losses, detached(terms)), (report, values)):
            for name, value in new.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value / len(batches)
    return Gradients(losses, report)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _two_passes(phase: Phase, batches: Sequence[Any], sync: Sync) -> Gradients:
    states, first = [], []
    for batch in batches:
        states.append(rng_state())
        with torch.no_grad():
            first.append(phase.forward(batch, True))
    leaves = _leaves(first)
    losses, _ = phase.loss(leaves)
    # also gives gradients to parameters of the loss itself, such as the temperature
    torch.stack(list(losses.values())).sum().backward()
    after = rng_state()
    start = dict.fromkeys(leaves.embeddings, 0)
    total = LossInputs()
    for number, (batch, state) in enumerate(zip(batches, states, strict=True), 1):
        restore_rng_state(state)
        with sync(number == len(batches)):
            inputs = phase.forward(batch, False)
            backward_through_unused(_pull_back(inputs, leaves, start), inputs, phase.modules)
        _add(total, inputs)
    restore_rng_state(after)
    with torch.no_grad():
        losses, report = phase.loss(total)
    return Gradients(losses, report)


def _leaves(first: Sequence[LossInputs]) -> LossInputs:
    """Merge the loss inputs of the first pass into leaf tensors, to differentiate the losses at."""
    inputs = LossInputs()
    for piece in first:
        _add(inputs, piece)
    if first:
        inputs.embeddings = {name: rows.requires_grad_() for name, rows in detached(inputs.embeddings).items()}
        inputs.mean_stats = {name: pool.requires_grad_() for name, pool in detached(inputs.mean_stats).items()}
        # losses are linear in the sums, so the gradient is constant: computed at zero
        inputs.sums = {name: torch.zeros_like(value).requires_grad_() for name, value in inputs.sums.items()}
    return inputs


def _pull_back(inputs: LossInputs, leaves: LossInputs, start: dict[str, int]) -> Tensor:
    """Scalar whose gradient is that of the global losses through this micro-batch's inputs."""
    terms = []
    for name, rows in inputs.embeddings.items():
        stop = start[name] + len(rows)
        gradient = leaves.embeddings[name].grad
        if gradient is not None:
            terms.append((rows * gradient[start[name] : stop]).sum())
        start[name] = stop
    for values, at in ((inputs.mean_stats, leaves.mean_stats), (inputs.sums, leaves.sums)):
        for name, value in values.items():
            gradient = at[name].grad
            if gradient is not None:
                terms.append((value * gradient).sum())
    return torch.stack(terms).sum()


def _add(total: LossInputs, piece: LossInputs) -> None:
    """Add the inputs of a micro-batch, detached, to ``total``."""
    for rows, new in ((total.embeddings, piece.embeddings), (total.metadata, piece.metadata)):
        for name, value in detached(new).items():
            rows[name] = torch.cat([rows[name], value]) if name in rows else value
    for sums, added in ((total.mean_stats, piece.mean_stats), (total.sums, piece.sums)):
        for name, value in detached(added).items():
            sums[name] = sums[name] + value if name in sums else value
    for name, count in piece.counts.items():
        total.counts[name] = total.counts.get(name, 0) + count
