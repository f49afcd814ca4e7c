"""What the two players pay, against literal twins and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlip.training.losses.adversarial import (
    Kind,
    RunningLogits,
    adaptive_factor,
    gradient_penalty,
    on_fake,
    on_real,
    priced,
    strength,
    to_fool,
)

KINDS: tuple[Kind, ...] = ("hinge", "non_saturating")


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize("kind", KINDS)
def test_both_players_against_a_literal_loop(kind: Kind) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 1, 2, 4)
    expected = np.zeros((3, 3))  # of real, of fake, of the generator
    for image in range(3):
        for value in logits[image].flatten().tolist():
            hinge = (max(0.0, 1 - value), max(0.0, 1 + value), -value)
            smooth = (softplus(-value), softplus(value), softplus(-value))
            expected[:, image] += np.array(hinge if kind == "hinge" else smooth) / 8
    for term, row in zip((on_real, on_fake, to_fool), expected, strict=True):
        found = term(logits, kind)
        assert found.shape == (3,) and found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), row, rtol=1e-5)
        assert term(logits.bfloat16(), kind).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_each_player_pulls_logits_its_own_way(kind: Kind) -> None:
    for term, sign in ((on_real, -1), (on_fake, 1), (to_fool, -1)):
        logits = torch.zeros(2, 1, requires_grad=True)
        term(logits, kind).sum().backward()
        assert logits.grad is not None and bool((logits.grad.sign() == sign).all())
    # past the margin the hinge is content; the generator never is
    sure = torch.full((1, 1), 3.0, requires_grad=True)
    on_real(sure, "hinge").sum().backward()
    assert sure.grad is not None and float(sure.grad) == 0.0


class Judge(nn.Module):
    """Smooth, small, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.Conv2d(4, 1, 2, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images)))


def test_r1_is_half_the_squared_gradient_by_finite_differences() -> None:
    judge = Judge()
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    found = gradient_penalty(judge(images), images)
    step, expected = 1e-5, torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for place in range(75):
            move = torch.zeros(75, dtype=torch.float64)
            move[place] = step
            ahead, behind = (judge(images + sign * move.view(1, 3, 5, 5)).flatten(1).mean(1) for sign in (1, -1))
            expected += ((ahead - behind) / (2 * step)).square() / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


def test_the_gradient_of_r1_by_finite_differences() -> None:
    judge = Judge()
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def penalty() -> Tensor:  # the formula once more, in float64
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(leaf).flatten(1).mean(1).sum(), leaf, create_graph=True)
        return gradient.square().sum() / 2

    leaf = images.clone().requires_grad_()
    gradient_penalty(judge(leaf), leaf).sum().backward()
    weight = judge.first.weight
    assert weight.grad is not None
    for place in (0, 17, 55, 107):
        flat = weight.data.view(-1)
        kept = float(flat[place])
        values = []
        for move in (1e-5, -1e-5):
            flat[place] = kept + move
            values.append(float(penalty().detach()))
        flat[place] = kept
        expected = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(float(weight.grad.view(-1)[place]), expected, rtol=1e-4, atol=1e-9)
    assert judge.second.weight.grad is not None and bool(judge.second.weight.grad.abs().sum() > 0)


def test_lecam_against_a_literal_twin() -> None:
    torch.manual_seed(2)
    running = RunningLogits(decay=0.9)
    means: tuple[float, float] | None = None
    for _ in range(4):
        real, fake = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2) - 1
        to_fake, to_real = running.pull(real, fake)
        for image in range(3):
            if means is None:  # nothing is known yet
                expected = (0.0, 0.0)
            else:
                expected = (
                    sum((value - means[1]) ** 2 for value in real[image].flatten().tolist()) / 4,
                    sum((value - means[0]) ** 2 for value in fake[image].flatten().tolist()) / 4,
                )
            np.testing.assert_allclose((float(to_fake[image]), float(to_real[image])), expected, rtol=1e-5)
        now = float(real.mean()), float(fake.mean())
        means = now if means is None else (0.9 * means[0] + 0.1 * now[0], 0.9 * means[1] + 0.1 * now[1])
        running.update(real.mean(), fake.mean())
        np.testing.assert_allclose((float(running.real), float(running.fake)), means, rtol=1e-5)
    back = RunningLogits(decay=0.9)
    back.load_state_dict(running.state_dict())
    assert torch.equal(back.pull(real, fake)[0], running.pull(real, fake)[0])


def test_a_priced_term_is_the_term_but_for_other_leaves() -> None:
    torch.manual_seed(3)
    judge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3))
    first, second = torch.randn(2, 3, 8, 8, requires_grad=True), torch.zeros(2, 3, 8, 8, requires_grad=True)

    def price(images: Tensor) -> Tensor:
        return judge(images).square().flatten(1).mean(1)

    plain = price(first * 2).sum() * 0.7
    plain.backward()
    assert judge[0].weight.grad is not None
    judge.zero_grad()
    with torch.no_grad():
        second.copy_(first)
    value = priced(second * 2, price) * 0.7
    value.backward()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(second.grad, first.grad)
    assert all(parameter.grad is None for parameter in judge.parameters())
    with torch.no_grad():
        torch.testing.assert_close(priced(first * 2, price), plain / 0.7)


def test_the_generators_term_starts_and_rises() -> None:
    assert [strength(step, 3, 4) for step in range(10)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [strength(step, 2, 0) for step in range(4)] == [0, 0, 1, 1]
    assert strength(0, 0, 0) == 1.0


def test_the_adaptive_factor_makes_lengths_equal_within_bounds() -> None:
    assert adaptive_factor(3.0, 0.5) == pytest.approx(6.0)
    assert adaptive_factor(3.0, 0.0) == 1e4 and adaptive_factor(0.0, 1.0) == 0.0
