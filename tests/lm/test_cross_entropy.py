"""The chunked cross entropy against PyTorch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.lm import cross_entropy
from qlip.lm.cross_entropy import linear_cross_entropy, linear_softmax
from qlip.training.costs import peak_bytes, without_memory


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


@pytest.mark.parametrize("at_once", [50, 1 << 22])
def test_linear_softmax__of_spans_is_a_softmax_over_each(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", at_once)
    hidden, weight, _ = inputs(30, 100)
    spans, span_of = ((0, 60), (60, 70), (70, 100)), torch.arange(30) % 3
    targets = torch.tensor([0, 60, 70])[span_of] + torch.randint(10, (30,))
    nats, norms = linear_softmax(hidden, weight, targets, spans, span_of)
    logits = torch.full((30, 100), float("-inf"))
    inside = torch.zeros(30, 100, dtype=torch.bool)
    for row, (begin, end) in enumerate(spans[number] for number in span_of.tolist()):
        inside[row, begin:end] = True
    logits = torch.where(inside, hidden @ weight.T, logits)
    plain, norm = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)
    torch.testing.assert_close((nats, norms), (plain, norm), atol=1e-5, rtol=1e-6)
    for ours, theirs in ((nats.sum(), plain.sum()), (norms.square().sum(), norm.square().sum())):
        found = torch.autograd.grad(ours, (hidden, weight), retain_graph=True)
        expected = torch.autograd.grad(theirs, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_softmax__takes_less_than_a_tenth_of_the_memory_of_all_logits(autocast: bool) -> None:
    steps, text, visual = 4096, 128_256, 16_384
    span_of = (torch.arange(steps) % 4 == 0).long()
    targets = span_of * text
    places = [(span_of == number).nonzero()[:, 0] for number in (0, 1)]
    with without_memory():
        hidden = torch.empty(steps, 2048, requires_grad=True)
        weight = torch.empty(text + visual, 2048, requires_grad=True)

    def ours() -> dict[str, Tensor]:
        return {"nats": linear_softmax(hidden, weight, targets, ((0, text), (text, text + visual)), span_of)[0]}

    def plain() -> dict[str, Tensor]:
        logits = hidden @ weight.T
        parts = [logits.index_select(0, places[0])[:, :text], logits.index_select(0, places[1])[:, text:]]
        return {str(n): F.cross_entropy(one, targets[places[n]] - n * text) for n, one in enumerate(parts)}

    needed = 4 * (hidden.numel() + weight.numel())  # gradients, which every loss needs
    needed += 2 * weight.numel() * autocast  # and autocast's copy of the weight
    peaks = []
    for loss in (ours, plain):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            peaks.append(peak_bytes(loss) - needed)
    assert peaks[0] < 0.03 * peaks[1], peaks


def test_large_logits__stay_finite() -> None:
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.5] * 4])
    nats = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert nats.tolist() == [0.0, 80000.0]
    nats.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
