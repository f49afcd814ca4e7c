"""What a process held at most is found, and may be forgotten."""

from __future__ import annotations

import torch

from qlip.runtime.machine import forget_peak, peak_memory

CPU = torch.device("cpu")


def test_the_peak_rises_and_is_forgotten() -> None:
    forgotten = forget_peak(CPU)
    before = peak_memory(CPU, forgotten)
    assert 2**24 < before < 2**40
    # 128 MiB more than is held; where nothing can be forgotten, than was ever held, which may be much
    much = torch.ones(2**25 + (0 if forgotten else before // 4))
    most = peak_memory(CPU, forgotten)
    assert most >= before + 4 * 2**24
    del much
    if forget_peak(CPU):
        assert peak_memory(CPU, forgotten=True) < most - 2**24
