"""LAMB: Adam with per-tensor updates rescaled by the norm of the weights (arXiv 1904.00962, algorithm 2).

Why not a library: pytorch_optimizer 4.1 omits the bias correction, always bounds weight norms at 10, and applies weight
decay outside the trust ratio; torch_optimizer is unmaintained; neither supports sharded tensors.
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

    where the ratio is 1 if either norm is 0. Groups without weight decay use no ratio either, as in the authors' code:
    the norm of a bias, of a normalisation gain or of the temperature is no measure of a suitable step size, and a bias
    initialised to 0 would hardly move. Embeddings decay and have the ratio, as in EVA-CLIP's grouping.

    Parameters may be sharded (FSDP2): norms are of whole tensors, and moments are sharded like their parameters.

    Args:
        params: parameters or groups; names are kept if given.
        lr: peak learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the moments, inside the trust ratio.
        bounds: low and high of phi; by default phi is the identity.
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
        """Update all parameters that have a gradient.

        Ranks that share sharded tensors must have gradients for the same ones.
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
        """Increment and return the step count of a parameter; initialise its state at the first step."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it needs no GPU synchronisation
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _step_batch(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Update parameters with the same step count together."""
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
    """Trust ratios phi(|x|) / |update| of whole tensors; 1 if either norm is 0."""
    weight_norms, update_norms = whole_norms([*weights, *updates], [*parameters, *parameters]).chunk(2)
    usable = (weight_norms > 0) & (update_norms > 0)
    return list(torch.where(usable, weight_norms.clamp(*bounds) / update_norms, 1.0).unbind())
