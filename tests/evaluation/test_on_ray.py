"""Ray's workers give the figures that one process gives; what goes wrong with them is one line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.evaluation.run.evaluate import Item
from qlip.evaluation.run.on_ray import Cluster, run_on_ray
from tests.cli.conftest import save_checkpoint

from .plain import Plain
from .tiny import write_pictures


def figures(found: object) -> list[float]:
    """All numbers of a result, in order; words must be equal."""
    if isinstance(found, dict):
        return [number for key in sorted(found) for number in figures(found[key])]
    if isinstance(found, list):
        return [number for one in found for number in figures(one)]
    return [found] if isinstance(found, float) else []


def words(found: object) -> object:
    """The same with floats left out: what must be equal to the last digit."""
    if isinstance(found, dict):
        return {key: words(one) for key, one in found.items()}
    if isinstance(found, list):
        return [words(one) for one in found]
    return None if isinstance(found, float) else found


@pytest.mark.slow
def test_workers_with_uneven_shares_give_one_process_figures(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pictures = write_pictures(tmp_path / "many", 600, 24, 0)  # chunks of 256, 256 and 88
    pictures[300].write_bytes(b"no picture")
    save_checkpoint(tmp_path / "model", seed=0)
    command = [sys.executable, "-m", "qlip", "eval", "-m", "model", "--data", "many", "--json"]
    command += ["--evaluator", "reconstruction", "--evaluator", "codebook", "-o"]
    ran = [
        subprocess.run([*command, name, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        for name, more in (("alone", ()), ("shared", ("--ray-workers", "2")))
    ]
    assert ran[1].returncode == 0 and ran[1].stderr == "", ran[1].stderr  # Ray says nothing
    alone, shared = (json.loads(one.stdout)["measured"] for one in ran)
    assert words(shared) == words(alone) and shared[0]["count"] == 599
    assert figures(shared) == pytest.approx(figures(alone), abs=1e-6)
    # rows are there now: no worker is needed, none is started
    again = subprocess.run(
        [*command, "shared", "--ray-workers", "2", "--ray-address", "127.0.0.1:1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert json.loads(again.stdout)["measured"] == shared


def test_no_ray_and_no_cluster_are_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "some", 2, 16, 0)
    subject = Plain(16, lambda pixels: pixels)
    items = [Item("some", str(tmp_path / "some"), "reconstruction")]

    def run(address: str | None) -> None:
        run_on_ray(
            subject,
            items,
            opener=lambda: pytest.fail("no worker may start"),
            work=tmp_path / "rows",
            cluster=Cluster(2, address),
        )

    if "ray" in sys.modules or __import__("importlib.util").util.find_spec("ray"):
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            with pytest.raises(QLIPError, match=rf"^Ray cannot be reached at 127.0.0.1:{port} \(.*refused\); measure"):
                run(f"127.0.0.1:{port}")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(QLIPError, match=r'this needs the package \'ray\': pip install "qlip\[archive\]"'):
        run(None)
