"""Balances and the probe against gradients worked out by hand on a shared linear layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlip import QLIPModel, QLIPProcessor
from qlip.data.loader.batch import Batch
from qlip.errors import QLIPError
from qlip.training.losses.balance import GradientNormBalance, UncertaintyBalance, term_gradients
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage1
from qlip.training.tasks.recipe import Stage1Recipe

X = torch.tensor([1.0, 2.0, 2.0])  # length 3
WEIGHTS = {"mse": 1000.0, "bsq": 1.0, "align": 2.0}


def layer() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(2, 3))


def pulls(shared: nn.Parameter, **directions: tuple[float, float]) -> dict[str, Tensor]:
    """A term c . W x for each c: its gradient at W is c x^T, whose norm is 3 |c|."""
    hidden = shared @ X
    return {name: (hidden * torch.tensor(direction)).sum() for name, direction in directions.items()}


def norm_of(loss: Tensor, shared: nn.Parameter) -> float:
    return float(torch.autograd.grad(loss, shared, retain_graph=True)[0].norm())


def test_gradient_norms_agree_in_the_ratio_of_the_weights() -> None:
    shared = layer()
    losses = pulls(shared, mse=(3.0, 4.0), bsq=(0.0, 0.02), align=(100.0, 0.0))  # norms 15, 0.06, 300
    balance = GradientNormBalance(WEIGHTS, reference="align", limit=1e6)
    balanced, report = balance(losses, shared)
    assert balanced.keys() == losses.keys()
    assert norm_of(balanced["align"], shared) == pytest.approx(300)
    assert norm_of(balanced["mse"], shared) == pytest.approx(300 * 1000 / 2)
    assert norm_of(balanced["bsq"], shared) == pytest.approx(300 * 1 / 2)
    factors = {"factor/mse": 500 * 300 / 15, "factor/bsq": 0.5 * 300 / 0.06, "factor/align": 1.0}
    assert {name: value.item() for name, value in report.items()} == pytest.approx(factors)
    assert not any(value.requires_grad for value in report.values())
    assert shared.grad is None


def test_norms_are_smoothed_with_bias_corrected() -> None:
    shared = layer()
    balance = GradientNormBalance({"a": 1.0, "b": 1.0}, decay=0.9)
    balance(pulls(shared, a=(1.0, 0.0), b=(2.0, 0.0)), shared)
    _, report = balance(pulls(shared, a=(3.0, 0.0), b=(1.0, 0.0)), shared)
    mean_a = (0.1 * 0.9 * 3 + 0.1 * 9) / (1 - 0.81)
    mean_b = (0.1 * 0.9 * 6 + 0.1 * 3) / (1 - 0.81)
    assert report["factor/b"].item() == pytest.approx(mean_a / mean_b)


def test_factors_stay_in_bounds() -> None:
    shared = layer()
    balance = GradientNormBalance({"a": 1.0, "b": 1.0, "c": 1.0}, limit=10.0)
    _, report = balance(pulls(shared, a=(1.0, 0.0), b=(1e-3, 0.0), c=(1e3, 0.0)), shared)
    assert [report[f"factor/{name}"].item() for name in "abc"] == pytest.approx([1.0, 10.0, 0.1])


def test_absent_terms_and_terms_without_a_gradient_leave_the_means_alone() -> None:
    shared, elsewhere = layer(), nn.Parameter(torch.ones(2))
    balance = GradientNormBalance({"a": 1.0, "b": 1.0})
    # before b has been seen it passes as it is; a term without a weight always does
    lone = pulls(shared, a=(1.0, 0.0)) | {"b": elsewhere.sum(), "other": (5 * elsewhere).sum()}
    balanced, report = balance(lone, shared)
    assert balanced["b"].item() == 2 and balanced["other"].item() == 10
    assert report.keys() == {"factor/a", "factor/b"}
    balance(pulls(shared, a=(1.0, 0.0), b=(4.0, 0.0)), shared)
    for losses in (pulls(shared, a=(1.0, 0.0)), lone, pulls(shared, a=(1.0, 0.0)) | {"b": torch.zeros(())}):
        balance(losses, shared)
    _, report = balance(pulls(shared, a=(1.0, 0.0), b=(4.0, 0.0)), shared)
    assert report["factor/b"].item() == pytest.approx(0.25)
    # a gradient that is not finite is the trainer's to refuse; the means survive it
    balance(pulls(shared, a=(1.0, 0.0), b=(math.inf, 0.0)), shared)
    assert balance.norms.isfinite().all()


def test_a_saved_balance_goes_on_and_evaluation_does_not_move_it() -> None:
    shared = layer()
    first, second = GradientNormBalance({"a": 1.0, "b": 3.0}), GradientNormBalance({"a": 1.0, "b": 3.0})
    first(pulls(shared, a=(1.0, 0.0), b=(2.0, 0.0)), shared)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        first(pulls(shared, a=(7.0, 0.0), b=(1.0, 0.0)), shared)
    losses = pulls(shared, a=(3.0, 0.0), b=(2.0, 1.0))
    one, other = (balance(losses, shared)[1] for balance in (first, second))
    assert one["factor/b"].equal(other["factor/b"])
    first.eval()
    assert first(pulls(shared, a=(7.0, 0.0), b=(1.0, 0.0)), shared)[1]["factor/b"].equal(one["factor/b"])


def test_what_cannot_be_balanced_is_refused() -> None:
    shared = layer()
    rows = (shared @ X).detach().requires_grad_()  # what the first of two passes leaves
    with pytest.raises(QLIPError, match="micro_batch_size=null"):
        GradientNormBalance({"a": 1.0})({"a": rows.sum()}, shared)
    still = layer().requires_grad_(False)
    terms = {"a": ((still @ X) * layer()[:, 0]).sum()}  # a graph, and none of it to the layer
    for look in (GradientNormBalance({"a": 1.0}), term_gradients):
        with pytest.raises(QLIPError, match=r"the shared layer is locked; .*model\.locked"):
            look(terms, still)
    with pytest.raises(QLIPError, match="'b' must be above 0"):
        GradientNormBalance({"a": 1.0, "b": 0.0})
    with pytest.raises(QLIPError, match="'c' is not a weighted term; choose one of a, b"):
        GradientNormBalance({"a": 1.0, "b": 1.0}, reference="c")


def test_uncertainty_is_the_papers_formula() -> None:
    shared = layer()
    balance = UncertaintyBalance(["a", "b"])
    losses = pulls(shared, a=(1.0, 0.0), c=(0.0, 1.0)) | {"b": (shared * shared).sum()}
    start, report = balance(losses)
    assert {name: value.item() for name, value in start.items()} == pytest.approx(
        {name: value.item() for name, value in losses.items()}
    )
    with torch.no_grad():
        balance.log_variances.copy_(torch.tensor([0.5, -1.0]))
    scaled, report = balance(losses, shared)
    assert scaled["a"].item() == pytest.approx(losses["a"].item() * math.exp(-0.5) + 0.5)
    assert scaled["b"].item() == pytest.approx(losses["b"].item() * math.exp(1.0) - 1.0)
    assert scaled["c"] is losses["c"]
    assert {name: value.item() for name, value in report.items()} == pytest.approx(
        {"factor/a": math.exp(-0.5), "factor/b": math.exp(1.0)}
    )
    torch.stack(list(scaled.values())).sum().backward()
    assert balance.log_variances.grad is not None
    expected = [1 - losses["a"].item() * math.exp(-0.5), 1 - losses["b"].item() * math.exp(1.0)]
    assert balance.log_variances.grad.tolist() == pytest.approx(expected)
    balance(pulls(shared, c=(1.0, 0.0)))  # terms may be absent


def test_learned_factors_end_at_the_inverse_of_the_losses() -> None:
    balance = UncertaintyBalance(["a", "b"])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        losses, report = balance({"a": torch.tensor(4.0), "b": torch.tensor(0.01)})
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert report["factor/a"].item() == pytest.approx(1 / 4, rel=0.02)
    assert report["factor/b"].item() == pytest.approx(100, rel=0.02)


def test_the_probe_gives_norms_and_cosines() -> None:
    shared, elsewhere = layer(), nn.Parameter(torch.ones(2))
    losses = pulls(shared, a=(3.0, 4.0), b=(0.0, -2.0), c=(4.0, -3.0)) | {"none": elsewhere.sum()}
    found = term_gradients(losses, shared)
    expected = {"norm/a": 15.0, "norm/b": 6.0, "norm/c": 15.0, "norm/none": 0.0}
    expected |= {"cosine/a/b": -0.8, "cosine/a/c": 0.0, "cosine/b/c": 0.6}
    expected |= {f"cosine/{name}/none": 0.0 for name in "abc"}
    assert found == pytest.approx(expected, abs=1e-6)
    assert shared.grad is None
    torch.stack(list(losses.values())).sum().backward()  # the graph is still there
    with pytest.raises(QLIPError, match="no term has a graph"):
        term_gradients({"none": elsewhere.sum()}, shared)


def test_stage1__balanced_terms_have_equal_norms_for_any_alpha(checkpoint: Path, recipe_values: dict) -> None:
    """The weighted terms are balanced, so alpha_r must not count again as the ratio of the norms."""
    model = QLIPModel.from_pretrained(checkpoint).train()
    recipe = check_recipe(recipe_values | {"losses": {"alpha_r": 1000, "balance": "gradient_norm"}}, "test")
    assert isinstance(recipe, Stage1Recipe)
    task = Stage1(model, QLIPProcessor.from_pretrained(checkpoint), recipe)
    batch = Batch(
        torch.randn(4, 3, 32, 32),
        torch.randint(0, 500, (4, 16)),
        torch.ones(4, dtype=torch.bool),
        torch.arange(4),
        [""] * 4,
        [None] * 4,
    )
    losses, report = task.loss(task.forward(batch, False))
    norms = {name: norm_of(losses[name], task.shared_layer) for name in ("mse", "align")}
    assert norms["mse"] == pytest.approx(norms["align"], rel=1e-3) and report["factor/align"] == 1
