"""Chunked contrastive losses against literal loops over pairs, forward and backward, and what they keep in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qlip.modeling.model import contrastive_loss
from qlip.training.losses import info_nce, siglip

CHUNKS = (None, 1, 3, 100)
TWINS = torch.tensor([1, 2, 1, 3, 2, 1, 7])


def literal_info_nce(images: Tensor, texts: Tensor, logit_scale: Tensor, ids: list[int]) -> Tensor:
    """Both directions, a softmax a row, the target shared among the row's twins."""
    total = torch.zeros((), dtype=images.dtype)
    for anchors, others in ((images, texts), (texts, images)):
        for row, anchor in enumerate(anchors):
            logits = [logit_scale.exp() * (anchor * other).sum() for other in others]
            norm = torch.stack([logit.exp() for logit in logits]).sum().log()
            twins = [column for column in range(len(ids)) if ids[column] == ids[row]]
            for column in twins:
                total = total - (logits[column] - norm) / len(twins)
    return total / (2 * len(ids))


def literal_siglip(images: Tensor, texts: Tensor, logit_scale: Tensor, bias: Tensor, ids: list[int]) -> Tensor:
    """arXiv 2303.15343, eq. 1, a pair at a time."""
    total = torch.zeros((), dtype=images.dtype)
    for row, image in enumerate(images):
        for column, text in enumerate(texts):
            sign = 1 if ids[row] == ids[column] else -1
            total = total - torch.sigmoid(sign * (logit_scale.exp() * (image * text).sum() + bias)).log()
    return total / len(ids)


def leaves(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, texts, log scale, bias, to be differentiated."""
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.randn(2, rows, 5, dtype=torch.float64, generator=generator)
    images, texts = F.normalize(drawn, dim=-1).to(dtype)
    scalars = [torch.tensor(value, dtype=dtype) for value in (1.5, -2.0)]
    return [leaf.requires_grad_() for leaf in (images, texts, *scalars)]


@pytest.mark.parametrize("ids", [None, TWINS])
def test_chunks_equal_literal_loops_forward_and_backward(ids: Tensor | None) -> None:
    places = list(range(7)) if ids is None else ids.tolist()
    inputs = leaves(7)
    wanted = literal_info_nce(*inputs[:3], places), literal_siglip(*inputs, places)
    for loss, expected, count in zip((info_nce, siglip), wanted, (3, 4), strict=True):
        gradients = torch.autograd.grad(3 * expected, inputs[:count])
        for chunk_size in CHUNKS:
            actual = loss(*inputs[:count], ids, chunk_size=chunk_size)
            torch.testing.assert_close(actual, expected)
            found = torch.autograd.grad(3 * actual, inputs[:count])
            for one, other in zip(found, gradients, strict=True):
                torch.testing.assert_close(one, other)
            with torch.no_grad():
                torch.testing.assert_close(loss(*inputs[:count], ids, chunk_size=chunk_size), expected)


def test_info_nce__equals_the_models_own_loss() -> None:
    images, texts, scale, _ = leaves(6, torch.float32)
    expected = contrastive_loss(scale.exp() * images @ texts.t())
    torch.testing.assert_close(info_nce(images, texts, scale, chunk_size=4), expected)


def test_gradients_are_the_functions_own() -> None:
    inputs = leaves(4)
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given, TWINS[:4], chunk_size=3), inputs[:3])
    assert torch.autograd.gradcheck(lambda *given: siglip(*given, TWINS[:4], chunk_size=3), inputs)


def test_digits_survive_a_small_temperature() -> None:
    """Pairs well told apart at 1/100: near 100 a float32 has steps of 8e-6, eight times this loss."""
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(32, 8), dim=-1)
    images = F.normalize(texts + 0.1 * torch.randn(32, 8), dim=-1)
    scale = torch.tensor(math.log(100.0))
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = images.to(dtype).requires_grad_()
        loss = info_nce(leaf, texts.to(dtype), scale.to(dtype), chunk_size=8)
        found.append((loss.double(), torch.autograd.grad(loss, leaf)[0].double()))
    (exact, exact_gradient), (loss, gradient) = found
    assert 1e-7 < exact < 1e-6
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0.0)
    assert (gradient - exact_gradient).norm() < 0.02 * exact_gradient.norm()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("ids", [None, torch.arange(96) // 2])
def test_memory_grows_with_the_batch_and_not_with_its_square(ids: Tensor | None) -> None:
    rows, width, chunk = 96, 5, 4
    losses: list[Callable[..., Tensor]] = [info_nce, siglip]
    for loss, count in zip(losses, (3, 4), strict=True):
        inputs = leaves(rows, torch.float32)[:count]
        largest = {}
        for chunk_size in (None, chunk):
            kept: list[int] = []

            def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(tensor.numel())
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with Largest() as mode, hooks:
                loss(*inputs, ids, chunk_size=chunk_size).backward()
            largest[chunk_size] = mode.elements
            assert sum(kept) <= 2 * rows * width + 4
        assert largest[None] == rows * rows
        # what goes round in bytes has 28 a row
        assert largest[chunk] <= max(chunk, 4 * width + 8) * rows < rows * rows


def test_autocast_leaves_logits_float32() -> None:
    images, texts, scale, bias = (leaf.detach() for leaf in leaves(8, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(images, texts, scale), siglip(images, texts, scale, bias)
        halves = info_nce(images.bfloat16(), texts.bfloat16(), scale)
    assert inside[0].equal(info_nce(images, texts, scale))
    assert inside[1].equal(siglip(images, texts, scale, bias))
    assert halves.dtype == torch.float32
    assert halves.equal(info_nce(images.bfloat16().float(), texts.bfloat16().float(), scale))


def test_no_pairs_give_an_exact_zero_with_a_graph() -> None:
    images, texts, scale, bias = leaves(0)
    for loss in (info_nce(images, texts, scale), siglip(images, texts, scale, bias)):
        assert loss.item() == 0.0
        gradients = torch.autograd.grad(loss, (images, texts, scale))
        assert [gradient.shape for gradient in gradients] == [images.shape, texts.shape, ()]
        assert gradients[2].item() == 0.0
