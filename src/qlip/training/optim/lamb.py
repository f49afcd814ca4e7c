"""LAMB: Adam whose update is rescaled, tensor by tensor, to the size of the weights (arXiv 1904.00962, algorithm 2).

Kept libraries have a LAMB, but not this one: pytorch_optimizer 4.1 leaves out the bias correction, bounds weight norms
at 10 without an option, and decays outside the trust ratio; torch_optimizer is no longer kept; neither knows tensors
that ranks share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from qlip.training.optim.clipping import local, whole_norms


class LAMB(Optimizer):
    """Layer-wise adaptive moments for large batches.

    With m and v Adam's bias-corrected moments and r = m / (sqrt(v) + eps), a tensor x moves by

        x <- x - lr * phi(|x|) / |r + decay * x| * (r + decay * x),    phi(z) = min(max(z, low), high),

    where the ratio is 1 if either norm is 0. Groups without decay take no ratio either, as in the authors' own code
    (what it excludes from decay it excludes from the adaptation too): the norm of a bias, a norm's gain or the
    temperature says nothing about the size of a sensible step, and a bias that starts at 0 would hardly ever leave it.

    Parameters may be sharded (FSDP2): norms are of whole tensors; the moments are sharded as their parameters are.

    Args:
        params: parameters or groups; names are kept where given.
        lr: peak learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the moments, inside the trust ratio.
        bounds: low and high of phi; the identity by default.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bounds: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bounds": bounds})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; a parameter without gradient is left alone.

        All ranks that share tensors must have gradients for the same ones.
        """
        assert closure is None
        for group in self.param_groups:
            batches: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    batches[self._count(parameter), parameter.device].append(parameter)
            for (step, _), parameters in batches.items():
                self._step_batch(parameters, step, group)

    def _count(self, parameter: Tensor) -> int:
        """The number of this step for a parameter, from 1."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())  # on the CPU: reading it must not wait for a GPU
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _step_batch(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Parameters that have been stepped equally often, together."""
        beta1, beta2 = group["betas"]
        weights = [local(parameter) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        first = [local(self.state[parameter]["exp_avg"]) for parameter in parameters]
        second = [local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        denominators = torch._foreach_div(second, 1 - beta2**step)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(first, 1 - beta1**step))
        torch._foreach_div_(updates, denominators)
        del denominators
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, _trust_ratios(parameters, weights, updates, group["bounds"]))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _trust_ratios(
    parameters: list[Tensor], weights: list[Tensor], updates: list[Tensor], bounds: tuple[float, float]
) -> list[Tensor]:
    """phi(|x|) / |update| of whole tensors, 1 where either is 0."""
    of_weights, of_updates = whole_norms([*weights, *updates], [*parameters, *parameters]).chunk(2)
    usable = (of_weights > 0) & (of_updates > 0)
    return list(torch.where(usable, of_weights.clamp(*bounds) / of_updates, 1.0).unbind())
