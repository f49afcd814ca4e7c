"""LAMB against a literal twin of the paper's algorithm 2 (arXiv 1904.00962) in numpy, in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from qlip.training.optim.lamb import LAMB

STEPS = 30


class Twin:
    """One tensor, line by line as the paper has it."""

    def __init__(self, x: np.ndarray, adapted: bool, decay: float, bounds: tuple[float, float]) -> None:
        self.x, self.adapted, self.decay, self.bounds = x.copy(), adapted, decay, bounds
        self.m, self.v, self.t = np.zeros_like(x), np.zeros_like(x), 0

    def step(self, g: np.ndarray, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g**2
        m = self.m / (1 - betas[0] ** self.t)
        v = self.v / (1 - betas[1] ** self.t)
        update = m / (np.sqrt(v) + eps) + self.decay * self.x
        ratio = 1.0
        if self.adapted:
            phi = min(max(np.linalg.norm(self.x), self.bounds[0]), self.bounds[1])
            size = np.linalg.norm(update)
            ratio = phi / size if np.linalg.norm(self.x) > 0 and size > 0 else 1.0
        self.x = self.x - lr * ratio * update


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.5, 2.0)])
def test_many_steps_against_the_twin(bounds: tuple[float, float]) -> None:
    generator = np.random.default_rng(0)
    starts = [generator.normal(size=shape) for shape in ((4, 6), (6, 4), (3,), (2, 3, 5))]
    starts.append(np.zeros((3, 3)))  # a tensor without a norm
    starts.append(10 * generator.normal(size=(4,)))
    parameters = [nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    groups = [
        {"params": parameters[:2], "weight_decay": 0.1},
        {"params": parameters[2:3], "weight_decay": 0.0},
        {"params": parameters[3:], "weight_decay": 0.05, "lr": 0.02},
    ]
    optimizer = LAMB(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-6, bounds=bounds)
    decays = (0.1, 0.1, 0.0, 0.05, 0.05, 0.05)
    twins = [Twin(start, decay > 0, decay, bounds) for start, decay in zip(starts, decays, strict=True)]
    for step in range(STEPS):
        factor = 1 - step / STEPS
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05 * factor
        optimizer.param_groups[2]["lr"] = 0.02 * factor
        for number, (parameter, twin) in enumerate(zip(parameters, twins, strict=True)):
            if number == 1 and step % 3 == 0:
                parameter.grad = None  # stepped less often than its neighbours
                continue
            gradient = generator.normal(size=twin.x.shape) * 10.0 ** generator.integers(-4, 3)
            parameter.grad = torch.from_numpy(gradient)
            twin.step(gradient, (0.05 if number < 3 else 0.02) * factor, (0.9, 0.95), 1e-6)
        optimizer.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        # the norms alone are single precision
        np.testing.assert_allclose(parameter.detach().numpy(), twin.x, rtol=1e-5, atol=1e-6)


def test_a_step_is_as_large_as_the_rate_says_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(torch.randn(32, 16))
        before = parameter.detach().clone()
        parameter.grad = torch.randn(32, 16) * scale
        LAMB([parameter], lr=0.01, eps=1e-12, weight_decay=1e-9).step()
        moved = (parameter.detach() - before).norm() / before.norm()
        assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_without_decay_it_is_adam() -> None:
    torch.manual_seed(0)
    ours, adams = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    lamb = LAMB([ours], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    adam = torch.optim.Adam([adams], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(10):
        ours.grad = torch.randn(5)
        adams.grad = ours.grad.clone()
        lamb.step()
        adam.step()
    torch.testing.assert_close(ours, adams)
