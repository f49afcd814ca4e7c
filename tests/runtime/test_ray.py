"""Around Ray: signal handlers, folders of sockets, the threads of each worker."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from qlip.runtime import ray
from qlip.runtime.ray import Cluster


def test_socket_folder__short_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/short")
    assert ray._socket_folder() == str(Path("/short/ray"))
    monkeypatch.setattr("tempfile.tempdir", "/" + "long" * 20)
    assert ray._socket_folder() is None


def test_keep_sigterm__restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError), ray._keep_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise OSError
    assert signal.getsignal(signal.SIGTERM) is before


def test_threads_per_worker__a_share_of_the_cluster() -> None:
    far = Cluster("head:6379", cpus=16, gpus=2, max_node_cpus=4, nodes=4)
    assert [far.threads_per_worker(workers) for workers in (1, 4, 8, 100)] == [4, 4, 2, 1]
    here = Cluster(None, cpus=64, gpus=0, max_node_cpus=64, nodes=1)
    assert here.threads_per_worker(1) == min(64, torch.get_num_threads())
