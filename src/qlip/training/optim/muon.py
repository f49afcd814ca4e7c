"""Muon: orthogonalised momentum for weight matrices (Jordan et al., 2024; scaled as in arXiv 2502.16982).

PyTorch's Muon always iterates in bfloat16, which is about a hundred times slower than float32 on most CPUs; this one
supports both and batches all matrices of the same shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from qlip.training.optim.clipping import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic polynomial: steep at 0, so that five iterations map every singular value into about [0.7, 1.2]."""


class Muon(Optimizer):
    """SGD with Nesterov momentum whose update is replaced by its nearest (semi-)orthogonal matrix.

    The update is scaled by 0.2 * sqrt(max(rows, columns)) to AdamW's typical root mean square, so that AdamW's learning
    rates and weight decay can be reused (arXiv 2502.16982, section 2.2).

    The update of a sharded matrix (FSDP2) is gathered, orthogonalised whole on each rank and sharded again; the
    momentum stays sharded.

    Args:
        params: matrices only; names are kept if given.
        lr: peak learning rate.
        momentum: decay of the running mean of gradients.
        weight_decay: decoupled, times the learning rate.
        iterations: number of Newton-Schulz iterations.
        dtype: data type of their products; bfloat16 is faster on GPUs and on CPUs that support it (avx512_bf16, AMX).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; for sharded ones, all ranks must have it or none."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            for parameters in shapes.values():
                self._step_batch(parameters, group)

    def _step_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of the same shape together."""
        lookahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            gradient, momentum = local(parameter.grad), local(state["momentum"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            lookahead.append(_gather(torch.lerp(gradient, momentum, group["momentum"]), parameter))
        updates = orthogonalize(torch.stack(lookahead), group["iterations"], self.dtype)
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, update in zip(parameters, updates.unbind(), strict=True):
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(_own_rows(update, parameter), alpha=-group["lr"] * scale)


def _gather(shard: Tensor, like: Tensor) -> Tensor:
    """Gather the whole matrix from shards with the layout of ``like``."""
    if not isinstance(like, DTensor):
        return shard
    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return whole.full_tensor()


def _own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a matrix, in the layout of ``like``; all ranks have the whole, so none is communicated."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


def orthogonalize(matrices: Tensor, iterations: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition, by a quintic Newton-Schulz iteration.

    Args:
        matrices: (B, rows, columns) float32.
        iterations: number of iterations; five map singular values into about [0.7, 1.2].
        dtype: data type of the products.

    Returns:
        (B, rows, columns), of the input's dtype; zero for a zero matrix.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
