"""Around Ray: signal handlers, folders of sockets, the threads of each worker."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
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


def test_keep_sigterm__a_sigterm_while_ray_starts_goes_to_the_handler_before() -> None:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt), ray._keep_sigterm():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_check_head__a_port_that_is_not_ray(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    monkeypatch.setattr(ray, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    time.sleep(1)  # silent
                else:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(OSError, match="not Ray|timed out"):
            ray._check_head(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 1


def test_check_head__an_http2_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 9]))  # its SETTINGS

        threading.Thread(target=serve, daemon=True).start()
        ray._check_head(f"127.0.0.1:{server.getsockname()[1]}")


def test_threads_per_worker__a_share_of_the_cluster() -> None:
    far = Cluster("head:6379", cpus=16, gpus=2, max_node_cpus=4, nodes=4)
    assert [far.threads_per_worker(workers) for workers in (1, 4, 8, 100)] == [4, 4, 2, 1]
    here = Cluster(None, cpus=64, gpus=0, max_node_cpus=64, nodes=1)
    assert here.threads_per_worker(1) == min(64, torch.get_num_threads())
