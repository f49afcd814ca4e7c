"""Schedules of guidance: their scales, their short form, their faults."""

from __future__ import annotations

import math

import pytest
import torch

from qlip.errors import QLIPError
from qlip.lm.guidance import SCHEDULES, Constant, Guidance, Interval, Linear, Power, mix, parse


def scales(guidance: Guidance, count: int = 5) -> list[float]:
    return [guidance.scale(token, count) for token in range(count)]


def test_schedules__have_their_scales() -> None:
    assert scales(Constant(3)) == [3] * 5
    assert scales(Interval(4, 1)) == [4, 4, 4, 1, 1]  # the first token, and decoding steps 0 and 1
    assert scales(Interval(4, -1 + 1)) == [4, 4, 1, 1, 1]
    assert scales(Linear(1, 3)) == [1, 1.5, 2, 2.5, 3]
    power = scales(Power(5, 1), 4)
    assert power == pytest.approx([1 + 4 * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    assert scales(Power(5, 3))[2] < scales(Power(5, 1))[2] and scales(Power(5, 2))[0] == 1
    assert scales(Linear(2, 3), 1) == [2]


@pytest.mark.parametrize("guidance", [Constant(7.5), Interval(4, 5), Linear(1, 4), Power(4, 2.5)])
def test_short_form__is_read_back(guidance: Guidance) -> None:
    assert parse(str(guidance)) == guidance
    assert SCHEDULES[guidance.to_dict()["name"]] is type(guidance)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a number"),
        ("intervall:4:5", "give a number, or one of"),
        ("power:4", "power:VALUE:POWER"),
        ("interval:4:1.5", "an integer"),
        ("nan", "0 or more"),
        ("inf", "0 or more"),
        ("-1", "0 or more"),
    ],
)
def test_short_form__that_says_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        parse(text)


def test_mix__follows_its_formula() -> None:
    given, null = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(mix(given, null, 3.0), torch.tensor([3.0, -2.0]))
    assert torch.equal(mix(given, null, 1.0), given) and torch.equal(mix(given, null, 0.0), given)
