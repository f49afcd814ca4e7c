from __future__ import annotations

import pytest

from qlip.training.optim.schedule import warmup_cosine


def test_warmup_then_half_a_cosine() -> None:
    def factor(step: int) -> float:
        return warmup_cosine(step, steps=110, warmup=10, floor=0.1)

    assert [factor(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    rates = [factor(step) for step in range(10, 111)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, steps=10, warmup=0) == 1.0


def test_all_warmup_never_divides_by_zero() -> None:
    assert [warmup_cosine(step, steps=4, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
