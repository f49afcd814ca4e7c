"""Loss weights computed at each step, as alternatives to the recipe's fixed weights; and per-term gradients.

A task's ``combine`` calls ``losses, factors = balance(losses, shared)`` on its weighted terms and adds ``factors`` to
its report. The balance is a module and is checkpointed like any other network of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch import distributed as dist

from qlip.errors import QLIPError
from qlip.modeling.reduce import is_distributed
from qlip.training.parallel.collectives import sum_over_ranks
from qlip.training.task import Losses, Report


class GradientNormBalance(nn.Module):
    """Scales terms so that their gradient norms at the shared layer are in the ratio of the recipe's weights.

    Generalises the adaptive weight of VQGAN (arXiv 2012.09841, eq. 7) to any number of terms. With m the gradient norm
    of a weighted term and w its weight, its factor is (w / w_ref) (m_ref / m): 1 for the reference. Norms are of
    gradients averaged over ranks, smoothed over steps. The cost is one extra backward pass per term to the shared
    layer.

    Requires the graph from the terms to the shared layer, for the rank's whole share of the batch. Two-pass gradient
    accumulation has no such graph when terms are combined, and a layer sharded over ranks (FSDP) is not whole on any
    rank; both raise a QLIPError when called.

    Args:
        weights: the recipe's weights by term name; other terms are returned unchanged.
        reference: the term whose factor stays 1; None means the first of ``weights``.
        decay: decay of the running means of the norms (bias-corrected).
        limit: factors are clamped to [1 / limit, limit].

    Raises:
        QLIPError: if a weight is not above 0, or ``reference`` is not in ``weights``.
    """

    norms: Tensor
    steps: Tensor

    def __init__(
        self, weights: Mapping[str, float], reference: str | None = None, decay: float = 0.99, limit: float = 1e4
    ) -> None:
        super().__init__()
        _check_weights(weights)
        self.weights = dict(weights)
        self.reference = next(iter(weights)) if reference is None else reference
        if self.reference not in weights:
            raise QLIPError(
                f"the reference {self.reference!r} is not a weighted term; choose one of {', '.join(weights)}"
            )
        self.decay, self.limit = decay, limit
        self.register_buffer("norms", torch.zeros(len(weights)))
        self.register_buffer("steps", torch.zeros(len(weights)))

    def forward(self, losses: Losses, shared: nn.Parameter) -> tuple[Losses, Report]:
        """Scale the terms of a step.

        Without grad mode, or in eval mode, the last factors are used and the running means stay.

        Args:
            losses: weighted terms, scalars, with a graph down to ``shared``; any of them may be absent.
            shared: weight of the layer at which gradients are compared.

        Returns:
            The scaled terms, and the factors as ``factor/<term>``.

        Raises:
            QLIPError: if no term has a graph to ``shared``, or it is not trainable.
        """
        balanced = {name: losses[name] for name in self.weights if name in losses}
        if self.training and torch.is_grad_enabled() and balanced:
            self._learn(list(balanced), _gradients(balanced, shared).norm(dim=1))
        factors = self._factors()
        scaled = {name: losses[name] * factors[name] if name in factors else losses[name] for name in losses}
        return scaled, {f"factor/{name}": factors[name] for name in balanced}

    def _learn(self, names: list[str], norms: Tensor) -> None:
        """Update the running means of the norms."""
        for name, norm in zip(names, norms, strict=True):
            place = list(self.weights).index(name)
            # a term without samples in this batch has norm 0, which is not its scale
            seen = (norm > 0) & norm.isfinite()
            mean = self.decay * self.norms[place] + (1 - self.decay) * norm
            self.norms[place] = torch.where(seen, mean, self.norms[place])
            self.steps[place] += seen

    def _factors(self) -> dict[str, Tensor]:
        """Factors of the weighted terms; 1 for terms without a norm yet, and for all while the reference has none."""
        means = self.norms / (1 - self.decay**self.steps)  # 0/0 before the first step
        weights = self.norms.new_tensor(list(self.weights.values()))
        place = list(self.weights).index(self.reference)
        factors = (weights / weights[place] * means[place] / means).clamp(1 / self.limit, self.limit)
        return dict(zip(self.weights, factors.nan_to_num(nan=1.0), strict=True))


class UncertaintyBalance(nn.Module):
    """Learns weights as uncertainties (arXiv 1705.07115): L becomes L exp(-s) + s, with one log variance s per term.

    Initially s is 0 and the terms keep the recipe's weights. At the optimum exp(-s) is 1 / L, which does not exist for
    a term that is or may become negative (an entropy): leave it out of ``names``, and it is returned unchanged.

    The log variances need an optimizer, without weight decay; they are used where terms are combined
    (``Phase.loss_parameters``).

    Args:
        names: names of the terms that get a log variance.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Losses, shared: nn.Parameter | None = None) -> tuple[Losses, Report]:
        """Scale the terms of a step.

        Args:
            losses: weighted terms, scalars; any of them may be absent.
            shared: ignored; accepted for the common interface.

        Returns:
            The scaled terms, including + s, and the factors exp(-s) as ``factor/<term>``.
        """
        del shared
        scaled, report = dict(losses), {}
        for name, log_variance in zip(self.names, self.log_variances, strict=True):
            if name in losses:
                factor = (-log_variance).exp()
                scaled[name] = losses[name] * factor + log_variance
                report[f"factor/{name}"] = factor.detach()
        return scaled, report


def term_gradients(losses: Losses, parameter: nn.Parameter) -> dict[str, float]:
    """Norms of the terms' gradients at a layer, averaged over ranks, and the cosines between the gradients.

    The graph is retained and no ``.grad`` is changed. A collective: all ranks call it, with the same terms.

    Args:
        losses: terms, scalars, with a graph; a term without a path to ``parameter`` has gradient 0.
        parameter: weight of the layer.

    Returns:
        ``norm/<term>``, and ``cosine/<a>/<b>`` per pair in the order of ``losses``; 0 if either norm is 0.

    Raises:
        QLIPError: if no term has a graph to ``parameter``, or it is not trainable.
    """
    gradients = _gradients(losses, parameter)
    norms = gradients.norm(dim=1)
    directions = gradients / norms.clamp_min(torch.finfo(gradients.dtype).tiny)[:, None]
    cosines = (directions @ directions.t()).tolist()
    found = {f"norm/{name}": norm for name, norm in zip(losses, norms.tolist(), strict=True)}
    for (row, first), (column, second) in combinations(enumerate(losses), 2):
        found[f"cosine/{first}/{second}"] = cosines[row][column]
    return found


def _gradients(losses: Losses, parameter: nn.Parameter) -> Tensor:
    """Gradients of the terms at a parameter, (terms, numel) float32, averaged over ranks in one collective."""
    if hasattr(parameter, "full_tensor"):
        raise QLIPError(
            "gradients of single terms need an unsharded layer, but this one is sharded; set parallel.kind=ddp"
        )
    if not parameter.requires_grad:
        raise QLIPError("the shared layer is locked; unlock it (model.locked), or do not use gradients of single terms")
    rows = []
    reached = torch.zeros(1, device=parameter.device)
    for loss in losses.values():
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        reached += gradient is not None
        rows.append(torch.zeros_like(parameter) if gradient is None else gradient)
    table = torch.stack([row.detach().float().flatten() for row in rows])
    # share across ranks whether a path was found, so that all ranks raise together
    both = sum_over_ranks(torch.cat((table.flatten(), reached)))
    if not both[-1]:
        raise QLIPError(
            "no term has a graph to the shared layer: two-pass micro-batches keep none; set micro_batch_size=null"
        )
    world = dist.get_world_size() if is_distributed() else 1
    return both[:-1].view_as(table) / world


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not weight > 0:
            raise QLIPError(f"the weight of {name!r} must be above 0 for gradient balancing, got {weight}")
