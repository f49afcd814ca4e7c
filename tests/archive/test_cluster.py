"""What surrounds Ray: who hears signals, what is said, and what each worker gets."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from qlip import QLIPError
from qlip.runtime import ray as cluster
from qlip.runtime.ray import Cluster


def test_a_socket_has_a_short_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/short")
    assert cluster._short_folder() == str(Path("/short/ray"))
    monkeypatch.setattr("tempfile.tempdir", "/" + "long" * 20)
    assert cluster._short_folder() is None


def test_sigterm_stays_whose_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError), cluster._own_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise OSError
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ray_was_told_to_end_is_no_news(capsys: pytest.CaptureFixture[str]) -> None:
    messages = cluster._Messages()
    print("(raylet) Task x failed. Error: The actor is dead because it was killed by `ray.kill`.", file=messages)
    print("(raylet) Task y failed.", "It is retried.", file=messages)
    assert capsys.readouterr() == ("", "(raylet) Task y failed. It is retried.\n")


def test_each_worker_gets_a_share_of_what_there_is() -> None:
    far = Cluster("head:6379", cpus=16, gpus=2, cpus_a_node=4, nodes=4)
    assert [far.threads_each(workers) for workers in (1, 4, 8, 100)] == [4, 4, 2, 1]
    here = Cluster(None, cpus=64, gpus=0, cpus_a_node=64, nodes=1)
    assert here.threads_each(1) == min(64, torch.get_num_threads())
    far.check_gpus(2, "--ray-workers")
    with pytest.raises(QLIPError, match="--ray-workers 3: there are 2 GPUs; take as many workers, or --device cpu"):
        far.check_gpus(3, "--ray-workers")
