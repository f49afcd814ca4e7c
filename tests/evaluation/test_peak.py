"""What a process held at most is found, and may be forgotten."""

from __future__ import annotations

import torch

from qlip.evaluation.peak import forget_peak, peak_memory

CPU = torch.device("cpu")


def test_the_peak_rises_and_is_forgotten() -> None:
    before = peak_memory(CPU)
    assert 2**24 < before < 2**40
    much = torch.ones(before // 4 + 2**24)  # four bytes each: more than was ever held
    most = peak_memory(CPU)
    assert most >= before + 4 * 2**24
    del much
    if forget_peak(CPU):
        assert peak_memory(CPU, forgotten=True) < most - 2**24
