"""Sums over the global batch with a graph, and ranks without a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from qlip.modeling.reduce import all_reduce_sum
from qlip.training.parallel.collectives import sum_over_ranks
from qlip.training.task import LossInputs


def filled(tensor: Tensor) -> Tensor:
    """The tensor, or one row of zeros where it has none: a network must run on every rank, or the others wait."""
    return tensor if len(tensor) else tensor.new_zeros((1, *tensor.shape[1:]))


def global_sums(inputs: LossInputs, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums and counts of all ranks, one collective each; gradients flow through the sums.

    Args:
        inputs: of this rank; names are the same on all ranks.
        device: of the sums.

    Returns:
        Scalars float32 by name, and exact numbers by name.
    """
    counts = sum_over_ranks(torch.tensor(list(inputs.counts.values()), dtype=torch.float64, device=device))
    totals: dict[str, Tensor] = {}
    if inputs.sums:
        totals = dict(zip(inputs.sums, all_reduce_sum(torch.stack(list(inputs.sums.values()))).unbind(), strict=True))
    return totals, dict(zip(inputs.counts, counts.tolist(), strict=True))
