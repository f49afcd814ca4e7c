"""Gradients of a global batch, whole or in micro-batches, and exact either way.

Cut into micro-batches, a contrastive batch needs two passes (GradCache, arXiv 2101.06983): the first runs the networks
without a graph and keeps what losses use non-linearly (embeddings, and the pools behind the entropies of mean
distributions); the losses' gradients at these are taken; the second pass runs each micro-batch again, with a graph, and
pulls them back together with the terms that are sums over samples. Random states are replayed, so dropout is the same.
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
"""Whether ranks exchange gradients in the backward pass of what follows; they do so in the last one of a phase."""


@dataclass(frozen=True)
class Gradients:
    """What came of a backward pass: the gradients are in the parameters.

    Attributes:
        losses: weighted terms, without a graph.
        report: what is logged.
    """

    losses: Losses
    report: Report

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return torch.stack(list(self.losses.values())).sum()


Inspect = Callable[[Losses], Report]
"""Looks at weighted terms while they still have their graph, e.g. at each one's gradient."""


def backward(
    phase: Phase,
    batches: Sequence[Any],
    exact: bool = True,
    sync: Sync = lambda last: nullcontext(),
    inspect: Inspect | None = None,
) -> Gradients:
    """Add a batch's gradients to the parameters'.

    Args:
        phase: what is minimised.
        batches: the micro-batches, the same number on every rank; one is the whole share at once.
        exact: two passes and the whole batch's gradients; else the mean of the micro-batches' own.
        sync: entered around each backward pass.
        inspect: its report is added; with micro-batches it sees the first one alone, in a pass of its own.
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
    """The same without a graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _mean(phase: Phase, batches: Sequence[Any], sync: Sync) -> Gradients:
    """Each micro-batch for itself; terms that some of them lack (no words) count for those that have them."""
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
    # also reaches parameters that the combination itself uses, such as the temperature
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
    """The first pass's inputs as one, cut from any graph, to take the losses' gradients at."""
    inputs = LossInputs()
    for piece in first:
        _add(inputs, piece)
    if first:
        inputs.embeddings = {name: rows.requires_grad_() for name, rows in detached(inputs.embeddings).items()}
        inputs.mean_stats = {name: pool.requires_grad_() for name, pool in detached(inputs.mean_stats).items()}
        # losses are linear in the sums, so their gradient is the same anywhere: here at zero
        inputs.sums = {name: torch.zeros_like(value).requires_grad_() for name, value in inputs.sums.items()}
    return inputs


def _pull_back(inputs: LossInputs, leaves: LossInputs, start: dict[str, int]) -> Tensor:
    """The scalar whose gradient is that of the whole batch's losses through this micro-batch's inputs."""
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
    """Put a micro-batch's inputs to the others', without their graph."""
    for rows, new in ((total.embeddings, piece.embeddings), (total.metadata, piece.metadata)):
        for name, value in detached(new).items():
            rows[name] = torch.cat([rows[name], value]) if name in rows else value
    for sums, added in ((total.mean_stats, piece.mean_stats), (total.sums, piece.sums)):
        for name, value in detached(added).items():
            sums[name] = sums[name] + value if name in sums else value
    for name, count in piece.counts.items():
        total.counts[name] = total.counts.get(name, 0) + count
