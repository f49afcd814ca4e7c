from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from qlip.modeling.model import contrastive_loss
from qlip.training.losses import info_nce


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float()


def test_info_nce_without_twins_is_clips_loss() -> None:
    torch.manual_seed(0)
    images, texts, scale = unit(7, 5), unit(7, 5), torch.tensor(2.0)
    logits = images @ texts.t() * scale.exp()
    expected = 0.0
    for table in (logits, logits.t()):
        for row in range(7):
            expected -= float(table[row, row] - table[row].logsumexp(0)) / 14
    for ids in (None, torch.arange(7)):
        torch.testing.assert_close(float(info_nce(images, texts, scale, ids)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(float(contrastive_loss(logits)), expected, rtol=1e-5, atol=1e-6)  # the model's own


def test_twins_share_their_target_and_the_floor_is_their_entropy() -> None:
    # two classes of two pairs, perfectly told apart: what is left is the entropy of a shared target, log 2
    images = texts = torch.eye(2).repeat_interleave(2, 0)
    ids = torch.tensor([5, 5, 9, 9])
    loss = info_nce(images, texts, torch.tensor(math.log(1000.0)), ids)
    torch.testing.assert_close(float(loss), math.log(2), rtol=1e-5, atol=1e-6)
    # with one positive a pair the same embeddings are pulled away from their twins
    embeddings = images.clone().requires_grad_(True)
    info_nce(embeddings, texts, torch.tensor(math.log(10.0)), ids).backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad[0], embeddings.grad[1])


def test_twins_against_a_literal_loop() -> None:
    torch.manual_seed(1)
    images, texts, scale = unit(6, 4), unit(6, 4), torch.tensor(1.5)
    ids = torch.tensor([1, 2, 1, 3, 2, 1])
    logits = (images @ texts.t()).double() * math.exp(1.5)
    expected = 0.0
    for table in (logits, logits.t()):
        for row in range(6):
            twins = [column for column in range(6) if ids[column] == ids[row]]
            expected -= sum(float(table[row, c] - table[row].logsumexp(0)) for c in twins) / len(twins) / 12
    torch.testing.assert_close(float(info_nce(images, texts, scale, ids)), expected, rtol=1e-5, atol=1e-6)


def test_losses_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(unit(4, 8).bfloat16(), unit(4, 8).bfloat16(), torch.tensor(1.0))
    assert loss.dtype == torch.float32
