"""The chunked cross entropy against PyTorch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.lm import cross_entropy
from qlip.lm.cross_entropy import linear_cross_entropy


def inputs(rows: int, values: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(values, 24, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(values, (rows,))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("at_once", [1, 500, 1 << 22])
def test_nats_and_gradients__equal_pytorchs(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", at_once)
    hidden, weight, targets = inputs(rows, 100)
    weights = torch.rand(rows)
    found = linear_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    theirs = torch.autograd.grad((plain * weights).sum(), (hidden, weight))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradient__exists_for_what_asks_for_it_alone() -> None:
    hidden, weight, targets = inputs(5, 30)
    linear_cross_entropy(hidden.detach(), weight, targets).sum().backward()
    assert hidden.grad is None and weight.grad is not None


def test_autocast__multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, targets = inputs(40, 300)
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
    found.sum().backward()
    assert found.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0.02)


def test_large_logits__stay_finite() -> None:
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.5] * 4])
    nats = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert nats.tolist() == [0.0, 80000.0]
    nats.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
