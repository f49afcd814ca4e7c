"""Ray, quiet, for as long as somebody needs it: started here, or an existing cluster's, and watched meanwhile."""

from __future__ import annotations

import _thread
import io
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

LOOK_EVERY, MISSES, GRACE = 3.0, 4, 5.0
"""Seconds between two looks at a cluster's head, how many in a row may fail, and seconds to end in good order then."""
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without GPUs keeps the machine's view of them
    "RAY_ENABLE_AUTO_CONNECT": "0",  # its data's threads, late at the end, would start another Ray, and wait for it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",  # a run here is what this machine is for; Ray's own choice is 15
    "RAY_TASK_MAX_RETRIES": "5",  # of what a worker that died was at
}


@dataclass(frozen=True)
class Wording:
    """How errors say what went wrong.

    Attributes:
        option: that says how many workers.
        no_start: Ray does not start on this machine; with ``{why}``.
        no_cluster: it has no cluster at an address; with ``{address}`` and ``{why}``.
        goes_on: what becomes of the work where a cluster goes away.
    """

    option: str
    no_start: str
    no_cluster: str
    goes_on: str


@dataclass(frozen=True)
class Cluster:
    """What there is to work with.

    Attributes:
        address: of an existing cluster, or None: started for this run, on this machine.
        cpus, gpus: of all nodes.
        cpus_a_node: of the largest.
        nodes: how many.
    """

    address: str | None
    cpus: int
    gpus: int
    cpus_a_node: int
    nodes: int

    def check_gpus(self, workers: int, option: str) -> None:
        """Whether each worker can have a GPU of its own; Ray would wait for them for ever.

        Raises:
            QLIPError: there are fewer.
        """
        if self.gpus < workers:
            raise QLIPError(f"{option} {workers}: there are {self.gpus} GPUs; take as many workers, or --device cpu")

    def threads_each(self, workers: int) -> int:
        """Of torch, for each of so many workers: Ray gives one where nobody says how many."""
        most = torch.get_num_threads() if self.address is None else self.cpus
        return min(max(1, min(most, self.cpus) // workers), self.cpus_a_node)


def quiet() -> Any:
    """The module ``ray``, which says nothing on the terminal.

    Raises:
        QLIPError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray, data = require("ray", extra="archive"), require("ray.data", extra="archive")
    for name in ("ray", "ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


@contextmanager
def running(address: str | None, wording: Wording, cpus: int, store: int) -> Iterator[Cluster]:
    """Ray, for as long as the context lasts.

    Args:
        address: of a cluster, ``auto`` for this machine's, or None for one of our own.
        wording: of errors.
        cpus, store: of one of our own, what it may think it has, and bytes of its object store.

    Raises:
        QLIPError: Ray is not installed or cannot start, there is no cluster there, or it goes away meanwhile.
    """
    ray = quiet()
    own: dict[str, Any] = {
        "num_cpus": cpus,
        "object_store_memory": store,
        "include_dashboard": False,
        "_temp_dir": _short_folder(),
    }
    try:
        if address:
            _knock(address)
        with _hushed(), _own_sigterm():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else own),
            )
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or line_of(error)
        said = wording.no_cluster if address else wording.no_start
        raise QLIPError(said.format(address=address, why=why)) from None
    lost = f"{f'the Ray cluster at {address}' if address else 'Ray'} went away; {wording.goes_on}"
    of_a_client = address is not None and "://" in address  # which looks for itself
    watch = None if of_a_client else _Watch(ray.get_runtime_context().gcs_address, lost)
    try:
        with redirect_stdout(_Messages()):  # where Ray says that it starts again what died; stdout is for results
            yield seen(ray, address)
    except KeyboardInterrupt:
        if watch is not None and watch.gone:
            raise QLIPError(lost) from None
        raise
    finally:
        if watch is not None:
            watch.stop()
        _stop(ray, patience=2 if watch is not None and watch.gone else 20)


def seen(ray: Any, address: str | None) -> Cluster:
    """What Ray, running, has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return Cluster(address, int(total.get("CPU", 1)), int(total.get("GPU", 0)), max(1, largest), len(nodes))


def line_of(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's core takes SIGTERM for a crash, from when it starts on; give it back to whoever had it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _hushed() -> Iterator[None]:
    """Ray's core says on the terminal how talkative it was asked to be, before it is quiet; what is wrong is raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _short_folder() -> str | None:
    """Ray's sockets lie in it, and their paths may have 107 letters: a long TMPDIR is too long."""
    folder = tempfile.gettempdir()
    return str(Path(folder) / "ray") if len(folder) <= 40 else None


def _knock(address: str) -> None:
    """Whether anybody is there at all: Ray itself asks for minutes. What is no HOST:PORT is left to it.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Watch:
    """Sees that the cluster's head still answers: Ray itself waits a minute for it, then ends the process unheard.

    Where it does not, the main thread is interrupted as by Ctrl-C, and `gone` is true; where that one is deaf, because
    it waits inside of Ray, the process says why and ends.

    Args:
        address: host and port of the head's control store.
        lost: what to say then.
    """

    def __init__(self, address: str, lost: str) -> None:
        host, _, port = address.rpartition(":")
        self._head, self._lost = (host.strip("[]"), int(port)), lost
        self.gone, self._stopped = False, threading.Event()
        threading.Thread(target=self._look, name="qlip-ray-watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _look(self) -> None:
        missed = 0
        while not self._stopped.wait(LOOK_EVERY):
            try:
                socket.create_connection(self._head, timeout=5).close()
                missed = 0
            except OSError:
                missed += 1
            if missed == MISSES:
                self.gone = True
                _thread.interrupt_main()
                if not self._stopped.wait(GRACE):
                    print(f"qlip: {self._lost}", file=sys.stderr, flush=True)
                    os._exit(1)
                return


class _Messages(io.TextIOBase):
    """Ray's messages, on stderr; but not that it will start again what it was told to end."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if "killed by `ray.kill`" not in line:
                print(line, file=sys.stderr, flush=True)
        return len(text)


def _stop(ray: Any, patience: float) -> None:
    """Leave Ray, also one that does not answer any more."""
    stopper = threading.Thread(target=ray.shutdown, name="qlip-ray-stop", daemon=True)
    stopper.start()
    stopper.join(patience)
