"""The one attention entry point against an explicit softmax, and rotary tables against pairwise rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlip.modeling.attention import attention, causal_padding_mask, rope_tables, rotate
from tests import literal


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1) @ v


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
"""Rows: none, the usual tail, and holes."""


@pytest.mark.parametrize("kind", ["plain", "causal", "padded"])
@pytest.mark.parametrize("head_dim", [4, 20, 64])
def test_attention__equals_an_explicit_softmax_forward_and_backward(kind: str, head_dim: int) -> None:
    torch.manual_seed(0)
    shape = (3, 2, 6, head_dim)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(shape)
    if kind == "plain":
        actual, expected = attention(*inputs), _explicit(*inputs, None)
    elif kind == "causal":
        mask = literal.text_mask(6, None, inputs[0])
        actual, expected = attention(*inputs, causal=True), _explicit(*inputs, mask)
    else:
        mask = causal_padding_mask(PADDING, torch.float32)
        actual = attention(*inputs, mask=mask)
        expected = _explicit(*inputs, literal.text_mask(6, PADDING, inputs[0]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((actual * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_causal_padding_mask__padding_before_the_text_adds_both_masks() -> None:
    """A padded first position sees itself and later unpadded ones equally: the lowest number on each."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    padding = torch.tensor([[0, 0, 1, 1]])
    actual = attention(q, k, v, mask=causal_padding_mask(padding, torch.float32))
    expected = _explicit(q, k, v, literal.text_mask(4, padding, q))
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_causal_padding_mask__half_precision_gives_no_nan() -> None:
    mask = causal_padding_mask(torch.tensor([[0, 1, 1, 0]]), torch.bfloat16)
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.bfloat16) for _ in range(3))
    assert torch.isfinite(attention(q, k, v, mask=mask)).all()


@pytest.mark.parametrize("masked", [True, False])
def test_under_autocast_on_a_cpu_it_is_float32_attention_of_the_rounded_inputs(masked: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 6, 20).bfloat16().requires_grad_() for _ in range(3)]
    exact = [one.detach().float().requires_grad_() for one in inputs]
    mask = causal_padding_mask(PADDING, torch.bfloat16) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        actual = attention(*inputs, mask=mask)
    expected = attention(*exact, mask=None if mask is None else mask.float())
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected.bfloat16())
    ours = torch.autograd.grad(actual.float().square().sum(), inputs)
    theirs = torch.autograd.grad(expected.bfloat16().float().square().sum(), exact)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other.bfloat16())


@pytest.mark.parametrize("grid", [(2, 2), (5, 5), (16, 16), (3, 7), (28, 28)])
@pytest.mark.parametrize("head_dim", [4, 20, 64])
def test_rotate__equals_the_literal_tables(grid: tuple[int, int], head_dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1] + 1, 3, head_dim)
    expected = literal.apply_rope(x, literal.rope_tables(*grid, head_dim), shift=1)
    actual = rotate(x, rope_tables(grid, head_dim, num_prefix=1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[:, 0], x[:, 0])


def test_rotate__keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    tables = rope_tables((4, 4), 8, num_prefix=0)
    spread = [rotate(x.expand(1, 16, 1, 8), tables)[0, :, 0].reshape(4, 4, 8) for x in (q, k)]
    torch.testing.assert_close(spread[0].norm(dim=-1), q.norm().expand(4, 4))
    first = spread[0][0, 1] @ spread[1][2, 3]
    moved = spread[0][1, 0] @ spread[1][3, 2]
    torch.testing.assert_close(first, moved, rtol=1e-4, atol=1e-4)
