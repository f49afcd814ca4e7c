"""Start and stop Ray quietly: a Ray of our own on this machine, or a connection to an existing cluster.

`running` yields a `Cluster`, which holds the available CPUs, GPUs and nodes. Signal handlers stay as they are: Ctrl-C
and SIGTERM raise in the main thread as without Ray. `_HeadWatch` interrupts the main thread when the cluster's head is
lost.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlip.errors import QLIPError, require

CHECK_SECONDS, MAX_FAILURES, GRACE_SECONDS = 3.0, 4, 5.0
"""Seconds between checks of the head, failures in a row until it is lost, seconds for an orderly end after that."""
CONNECT_SECONDS = 10.0
HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""An empty SETTINGS frame of HTTP/2, with which both sides of a gRPC connection begin."""
MAX_SOCKET_FOLDER = 40
"""Length of a temporary folder's name that still leaves room for Ray's socket paths of at most 107 characters."""
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without GPUs keeps the machine's view of them
    "RAY_ENABLE_AUTO_CONNECT": "0",  # late threads of Ray Data would start another Ray and wait for it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core then prints one line of notice, and no errors of retried work
    "RAY_worker_niceness": "0",  # Ray's default is 15
    "RAY_TASK_MAX_RETRIES": "5",
}
RESUME = "finished work is kept, the same command resumes it"


@dataclass(frozen=True)
class Cluster:
    """Resources of a running Ray.

    Attributes:
        address: address of an existing cluster; None for a Ray started for this run on this machine.
        cpus, gpus: total of all nodes.
        max_node_cpus: CPUs of the largest node.
        nodes: number of machines.
    """

    address: str | None
    cpus: int
    gpus: int
    max_node_cpus: int
    nodes: int

    def threads_per_worker(self, workers: int) -> int:
        """Return the number of torch threads per worker for a number of workers; Ray's default is one."""
        most = torch.get_num_threads() if self.address is None else self.cpus
        return min(max(1, min(most, self.cpus) // workers), self.max_node_cpus)


def import_ray() -> Any:
    """Import ``ray``, configured to print nothing.

    Raises:
        QLIPError: it is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray, data = require("ray", extra="archive"), require("ray.data", extra="archive")
    for name in ("ray", "ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


@contextmanager
def running(address: str | None, *, cpus: int, object_store_bytes: int) -> Iterator[Cluster]:
    """Run Ray while the context is open.

    Args:
        address: address of a cluster, ``auto`` for this machine's, or None to start Ray here.
        cpus, object_store_bytes: size of a Ray that is started here.

    Raises:
        QLIPError: Ray is not installed or cannot start, no cluster is at the address, or it is lost.
    """
    ray = import_ray()
    own: dict[str, Any] = {
        "num_cpus": cpus,
        "object_store_memory": object_store_bytes,
        "include_dashboard": False,
        "_temp_dir": _socket_folder(),
    }
    try:
        if address:
            _check_head(address)
        with _keep_sigterm():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else own),
            )
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        remedy = "check the address, and set RAY_AUTH_MODE=token if the cluster wants one"
        message = f"no Ray cluster at {address} ({why}); {remedy}"
        raise QLIPError(message if address else f"Ray does not start here ({why}); run without it") from None
    lost = f"{f'the Ray cluster at {address}' if address else 'Ray'} went away; {RESUME}"
    watch = _HeadWatch(ray.get_runtime_context().gcs_address, lost)
    try:
        with redirect_stdout(sys.stderr):  # Ray prints messages on stdout, which is for results
            yield _resources(ray, address)
    except KeyboardInterrupt:
        if watch.lost:
            raise QLIPError(lost) from None
        raise
    finally:
        watch.stop()
        stopper = threading.Thread(target=ray.shutdown, name="qlip-ray-stop", daemon=True)
        stopper.start()
        stopper.join(2 if watch.lost else 20)  # shutdown may hang


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__


def _resources(ray: Any, address: str | None) -> Cluster:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return Cluster(address, int(total.get("CPU", 1)), int(total.get("GPU", 0)), max(1, largest), len(nodes))


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Restore the SIGTERM handler that Ray replaces when it starts; a SIGTERM in between goes to that handler."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(before):  # Ray's own handler exits with the signal's number
            before(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _socket_folder() -> str | None:
    """Return a folder for Ray's sockets; None for Ray's own choice where TMPDIR is too long."""
    folder = tempfile.gettempdir()
    return str(Path(folder) / "ray") if len(folder) <= MAX_SOCKET_FOLDER else None


def _connection(address: str) -> socket.socket | None:
    """Open a connection to HOST:PORT; None for another form, such as auto. Raises OSError: nothing listens there."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return None
    return socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS)


def _connect(address: str) -> None:
    """Connect to HOST:PORT once, since Ray itself would retry for minutes. Raises OSError: nothing listens there."""
    if connection := _connection(address):
        connection.close()


def _check_head(address: str) -> None:
    """Check that a gRPC server listens at HOST:PORT, as a cluster's head does; Ray itself would try for minutes.

    Raises:
        OSError: nothing listens there, or something else.
    """
    if (opened := _connection(address)) is None:
        return
    with opened as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):  # TLS would need the cluster's certificates
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS)
            connection.settimeout(CONNECT_SECONDS)
            if connection.recv(9)[3:4] != HTTP2_SETTINGS[3:4]:
                raise OSError("what listens there is not Ray")


class _HeadWatch:
    """Thread that checks the cluster's head, since Ray's core ends the process with no message when the head is lost.

    On loss, the main thread is interrupted as by Ctrl-C. If it waits inside Ray and does not react, the process prints
    the message and ends.

    Args:
        address: host and port of the head's control store.
        message: printed on loss.
    """

    def __init__(self, address: str, message: str) -> None:
        self._address, self._message = address, message
        self.lost, self._stopped = False, threading.Event()
        threading.Thread(target=self._run, name="qlip-ray-watch", daemon=True).start()

    def stop(self) -> None:
        """End the checks."""
        self._stopped.set()

    def _run(self) -> None:
        failures = 0
        while not self._stopped.wait(CHECK_SECONDS):
            try:
                _connect(self._address)
                failures = 0
            except OSError:
                failures += 1
            if failures == MAX_FAILURES:
                self.lost = True
                _thread.interrupt_main()
                if not self._stopped.wait(GRACE_SECONDS):
                    print(f"qlip: {self._message}", file=sys.stderr, flush=True)
                    os._exit(1)
                return
