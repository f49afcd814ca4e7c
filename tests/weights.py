"""Weights that tests need and the package does not carry: fetched once a machine, or the tests that need them wait."""

from __future__ import annotations

import fcntl
import functools

import pytest

from qlip.data import public as datasets
from qlip.errors import QLIPError


@functools.cache
def lpips_weights() -> None:
    """See to it that LPIPS' weights are in this machine's cache; skip the test where they cannot be had."""
    home = datasets.cache_folder() / "datasets"
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lpips.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes fetch them once
        try:
            datasets.get("lpips", progress=False)
        except QLIPError as error:
            if "check the network" not in str(error):
                raise
            pytest.skip(str(error))
