"""Models and devices that cannot be loaded are errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "gpu"])
def test_load__unknown_device(qlip: Command, photos: Path, model: Path, device: str) -> None:
    ran = qlip("encode", photos, "--device", device, "-m", model)
    assert ran.code == 2 and len(ran.error_lines) == 1
    assert f"--device {device}: this machine has " in ran.err


@pytest.mark.parametrize(
    ("name", "said"),
    [("qlip-nano-46", "qlip-nano-64"), ("./no/such/folder", "no such folder"), ("a/b/c", "no such folder")],
)
def test_load__unknown_model(qlip: Command, photos: Path, name: str, said: str) -> None:
    ran = qlip("encode", photos, "-m", name)
    assert ran.code == 1 and len(ran.error_lines) == 1
    assert ran.err.startswith(f"qlip: {name}: ") and said in ran.err


def test_load__folder_without_checkpoint(qlip: Command, photos: Path) -> None:
    ran = qlip("encode", photos, "-m", photos)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "config.json" in ran.err
