"""Differentiable sums over the global batch, also with ranks that have no samples."""

from __future__ import annotations

import torch
from torch import Tensor

from qlip.modeling.reduce import all_reduce_sum
from qlip.training.parallel.collectives import sum_over_ranks
from qlip.training.task import LossInputs


def filled(tensor: Tensor) -> Tensor:
    """Return the tensor, or one row of zeros if it is empty: the network must run on every rank to avoid a deadlock."""
    return tensor if len(tensor) else tensor.new_zeros((1, *tensor.shape[1:]))


def global_sums(inputs: LossInputs, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Reduce sums and counts over ranks, in one collective each; the sums are differentiable.

    Args:
        inputs: loss inputs of this rank; names are equal on all ranks.
        device: device of the sums.

    Returns:
        Sums as float32 scalars by name, and exact counts by name.
    """
    counts = sum_over_ranks(torch.tensor(list(inputs.counts.values()), dtype=torch.float64, device=device))
    totals: dict[str, Tensor] = {}
    if inputs.sums:
        totals = dict(zip(inputs.sums, all_reduce_sum(torch.stack(list(inputs.sums.values()))).unbind(), strict=True))
    return totals, dict(zip(inputs.counts, counts.tolist(), strict=True))
