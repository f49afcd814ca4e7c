"""Peak memory of the process, and versions of packages."""

from __future__ import annotations

import torch

from qlip.runtime.machine import package_versions, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_peak_memory__rises_and_is_reset() -> None:
    was_reset = reset_peak_memory(CPU)
    before = peak_memory(CPU, was_reset)
    assert 2**24 < before < 2**40
    # 128 MiB more than is held; where it cannot be reset, than ever before
    much = torch.ones(2**25 + (0 if was_reset else before // 4))
    most = peak_memory(CPU, was_reset)
    assert most >= before + 4 * 2**24
    del much
    if reset_peak_memory(CPU):
        assert peak_memory(CPU, was_reset=True) < most - 2**24


def test_package_versions__none_for_a_package_that_is_not_installed() -> None:
    assert package_versions(["torch", "no-such-package"]) == {"torch": torch.__version__, "no-such-package": None}
