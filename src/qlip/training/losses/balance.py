"""Weights of the terms found anew at each step, as alternatives to the recipe's fixed ones; and what they look at.

A task's ``combine`` calls ``losses, factors = balance(losses, shared)`` on its weighted terms and adds ``factors`` to
its report. The balance is a module, saved with the run like any other network of the task.
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
    """Scales terms so that the norms of their gradients at the shared layer are in the ratio of the recipe's weights.

    The adaptive weight of VQGAN (arXiv 2012.09841, eq. 7) for any number of terms. With m the norm of a weighted
    term's gradient and w its weight, its factor is (w / w_ref) (m_ref / m): 1 for the reference. Norms are of the
    gradient averaged over ranks, and smoothed over steps. The cost is one more backward pass from each term to the
    shared layer.

    It needs the graph from the terms to the shared layer: a rank's whole share of the batch at once. Accumulation of
    micro-batches in two passes has none when terms are combined, and a layer sharded over ranks (FSDP) has none of its
    own; both are refused with a QLIPError when called.

    Args:
        weights: the recipe's weight of each term by its name; terms that are not named pass unchanged.
        reference: the term whose factor stays 1; the first of ``weights`` where None.
        decay: of the running means of norms, bias-corrected.
        limit: factors stay in [1 / limit, limit].

    Raises:
        QLIPError: a weight is not above 0, or ``reference`` has none.
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
            raise QLIPError(f"the reference {self.reference!r} is no weighted term; one of {', '.join(weights)} is")
        self.decay, self.limit = decay, limit
        self.register_buffer("norms", torch.zeros(len(weights)))
        self.register_buffer("steps", torch.zeros(len(weights)))

    def forward(self, losses: Losses, shared: nn.Parameter) -> tuple[Losses, Report]:
        """Scale a step's terms.

        Without grad mode or outside training, the factors of the last step are used and nothing is learned.

        Args:
            losses: weighted terms, scalars, with a graph down to ``shared``; any of them may be absent.
            shared: the layer's weight at which gradients are compared.

        Returns:
            The terms, and the factors ``factor/<term>``.

        Raises:
            QLIPError: there is no graph from any term to ``shared``, or it does not train.
        """
        balanced = {name: losses[name] for name in self.weights if name in losses}
        if self.training and torch.is_grad_enabled() and balanced:
            self._learn(list(balanced), _gradients(balanced, shared).norm(dim=1))
        factors = self._factors()
        scaled = {name: losses[name] * factors[name] if name in factors else losses[name] for name in losses}
        return scaled, {f"factor/{name}": factors[name] for name in balanced}

    def _learn(self, names: list[str], norms: Tensor) -> None:
        for name, norm in zip(names, norms, strict=True):
            place = list(self.weights).index(name)
            # a term that no sample of this batch has says nothing about its scale
            seen = (norm > 0) & norm.isfinite()
            mean = self.decay * self.norms[place] + (1 - self.decay) * norm
            self.norms[place] = torch.where(seen, mean, self.norms[place])
            self.steps[place] += seen

    def _factors(self) -> dict[str, Tensor]:
        """Of the weighted terms; 1 for those that have no norm yet, and for all while the reference has none."""
        means = self.norms / (1 - self.decay**self.steps)  # 0/0 before the first step
        weights = self.norms.new_tensor(list(self.weights.values()))
        place = list(self.weights).index(self.reference)
        factors = (weights / weights[place] * means[place] / means).clamp(1 / self.limit, self.limit)
        return dict(zip(self.weights, factors.nan_to_num(nan=1.0), strict=True))


class UncertaintyBalance(nn.Module):
    """Weights learned as each term's uncertainty (arXiv 1705.07115): L exp(-s) + s, with a log variance s a term.

    At the start s is 0, and the terms are the recipe's. At the optimum exp(-s) is 1 / L, so a term that is or may
    become negative (an entropy) has none: leave it out of ``names``, and it passes unchanged.

    Its parameters belong to an optimizer, without weight decay, and are used where terms are combined
    (``Phase.loss_parameters``).

    Args:
        names: the terms that have a log variance.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Losses, shared: nn.Parameter | None = None) -> tuple[Losses, Report]:
        """Scale a step's terms.

        Args:
            losses: weighted terms, scalars; any of them may be absent.
            shared: not looked at.

        Returns:
            The terms, s included, and the factors exp(-s) as ``factor/<term>``.
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
    """How terms pull at a layer: the norms of their gradients there, averaged over ranks, and the angles between them.

    The graph is kept and no ``.grad`` is touched. All ranks call it, with the same terms.

    Args:
        losses: terms, scalars, with a graph; one without a path to ``parameter`` has gradient 0.
        parameter: the layer's weight.

    Returns:
        ``norm/<term>``, and ``cosine/<a>/<b>`` for each pair in the order of ``losses``: 0 where either norm is.

    Raises:
        QLIPError: no term has a graph to ``parameter``, or it does not train.
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
    """(terms, numel) float32 gradients at a parameter, averaged over ranks, by one collective."""
    if hasattr(parameter, "full_tensor"):
        raise QLIPError(
            "gradients of single terms are taken at a whole layer, and this one is sharded; set parallel.kind=ddp"
        )
    if not parameter.requires_grad:
        raise QLIPError("the shared layer is locked; train it (model.locked), or leave gradients of single terms out")
    rows = []
    reached = torch.zeros(1, device=parameter.device)
    for loss in losses.values():
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        reached += gradient is not None
        rows.append(torch.zeros_like(parameter) if gradient is None else gradient)
    table = torch.stack([row.detach().float().flatten() for row in rows])
    # all ranks learn together whether there was a path, so that none stops alone
    both = sum_over_ranks(torch.cat((table.flatten(), reached)))
    if not both[-1]:
        raise QLIPError(
            "no term has a graph to the shared layer: micro-batches in two passes leave none; set micro_batch_size=null"
        )
    world = dist.get_world_size() if is_distributed() else 1
    return both[:-1].view_as(table) / world


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not weight > 0:
            raise QLIPError(f"the weight of {name!r} must be above 0 to balance its gradient by, got {weight}")
