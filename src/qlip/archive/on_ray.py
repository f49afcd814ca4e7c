"""The engine on Ray Data: CPU tasks decode shards, actors hold the model, this process writes the parts.

Ray restarts what dies: a shard whose reader died is read again, a batch whose model died is encoded again, and the
driver knows each piece by its shard and number. Batches wait in Ray's object store, which is small, and Ray holds the
readers back while it fills.
"""

from __future__ import annotations

import _thread
import io
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip.archive.encoding import Encoder
from qlip.archive.engine import Piece
from qlip.archive.inputs import InputShard
from qlip.archive.layout import BrokenImage
from qlip.archive.work import ReadyBatch, Row, ShardEnd, Work, batches_of, of_bytes, to_bytes
from qlip.data.stores import DeniedError
from qlip.errors import QLIPError, require

STORE = 1 << 30
"""Bytes of a local object store, at most."""
BLOCK = 8 << 20
"""Bytes of batches that a task hands on at a time, about."""
MOST_BLOCKS = 10_000
LOOK_EVERY, MISSES, GRACE = 3.0, 4, 5.0
"""Seconds between two looks at a cluster's head, how many in a row may fail, and seconds to end in good order then."""
GOES_ON = "finished parts are kept, the same command goes on"
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without GPUs keeps the machine's view of them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",  # a run here is what this machine is for; Ray's own choice is 15
    "RAY_TASK_MAX_RETRIES": "5",  # of a shard whose reader died
}


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


def installed() -> bool:
    """Whether Ray is."""
    return find_spec("ray") is not None


@contextmanager
def started(address: str | None = None, workers: int = 1) -> Iterator[Cluster]:
    """Ray, for as long as the context lasts: started here, or an existing cluster's.

    Args:
        address: of a cluster, ``auto`` for this machine's, or None for one of our own.
        workers: models that shall run at once; one of our own is given room for them and a reader.

    Raises:
        QLIPError: Ray is not installed, cannot start, or there is no cluster there.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray = require("ray", extra="archive")
    require("ray.data", extra="archive")
    for name in ("ray", "ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    own: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, workers + 1),
        "object_store_memory": _store_bytes(),
        "include_dashboard": False,
        "_temp_dir": _short_folder(),
    }
    if address:
        _look_for(address)
    try:
        with _hushed(), _own_sigterm():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else own),
            )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        if address:
            raise _no_cluster(address, _line(error)) from None
        raise QLIPError(f"Ray does not start here ({_line(error)}); --workers 0 works without it") from None
    lost = f"{f'the Ray cluster at {address}' if address else 'Ray'} went away; {GOES_ON}"
    watch = _Watch(ray.get_runtime_context().gcs_address, lost)
    try:
        with redirect_stdout(_Messages()):  # where Ray says that it starts again what died; stdout is for results
            yield _seen(ray, address)
    except KeyboardInterrupt:
        if watch.gone:
            raise QLIPError(lost) from None
        raise
    finally:
        watch.stop()
        _stop(ray, patience=2 if watch.gone else 20)


def pieces(todo: Sequence[tuple[int, InputShard]], work: Work, cluster: Cluster, workers: int) -> Iterator[Piece]:
    """All pieces of shards, in the order in which they are ready.

    Args:
        todo: shards with their numbers.
        work: what is made of them.
        cluster: where.
        workers: models that run at once, each on a GPU of its own where the work's device is a GPU.

    Raises:
        QLIPError: workers keep dying, or the cluster goes away.
        DeniedError: a picture may not be read; all others would be broken, too.
    """
    ray = require("ray", extra="archive")
    data = require("ray.data", extra="archive")
    _configure(data)
    on_gpu = work.info.device == "cuda"
    check_room(cluster, workers, on_gpu)
    threads = max(1, min(torch.get_num_threads() if cluster.address is None else cluster.cpus, cluster.cpus) // workers)
    rows = [{"part": part, "shard": shard} for part, shard in todo]
    encoded = (
        data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        .flat_map(_Decode(work), num_cpus=1)
        .map_batches(
            _Encode,
            fn_constructor_args=(work, min(threads, cluster.cpus_a_node)),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=workers),
            num_gpus=1 if on_gpu else 0,
            num_cpus=1,
        )
    )
    try:
        for row in encoded.iter_rows():
            yield _piece(row)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, QLIPError):
            raise QLIPError(str(cause)) from None
        if isinstance(cause, ModuleNotFoundError):
            raise QLIPError(f"the cluster's machines lack {cause.name}; install qlip[archive] there") from None
        raise
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise QLIPError(f"Ray: {_line(error)}; {GOES_ON}") from None


def check_room(cluster: Cluster, workers: int, on_gpu: bool) -> None:
    """Whether so many models can run at once.

    Raises:
        QLIPError: they cannot.
    """
    if on_gpu and cluster.gpus < workers:
        raise QLIPError(f"--workers {workers}: there are {cluster.gpus} GPUs; take as many workers, or --device cpu")
    if cluster.cpus <= workers:  # each model takes one, and somebody must read
        raise QLIPError(
            f"--workers {workers}: the cluster has {cluster.cpus} CPUs, and one must be left to read; take fewer"
        )


class _Decode:
    """A shard to its ready batches, one row each, and a last row; Ray hands rows on while it goes."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        part = int(row["part"])
        try:
            for found in batches_of(row["shard"], self.work):
                yield _decoded(part, found)
        except (QLIPError, OSError) as error:
            kind = "denied" if isinstance(error, DeniedError) else "failed"
            yield _row(part, -1, kind, " ".join(str(error).split()))


class _Encode:
    """An actor with the model: batches of one row to batches of one row."""

    def __init__(self, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        self.encoder = Encoder(work)

    def __call__(self, batch: Any) -> Any:
        arrow = require("pyarrow", extra="archive")
        row = {name: batch.column(name)[0] for name in batch.schema.names}
        if row["kind"].as_py() != "batch":
            return batch
        table = to_bytes(self.encoder(_ready(row)))
        done = _row(row["part"].as_py(), row["number"].as_py(), "table", "", table)
        return arrow.Table.from_pylist([done], batch.schema)


def _row(part: int, number: int, kind: str, note: str, payload: bytes = b"") -> dict[str, Any]:
    """The one kind of row that travels: so that all blocks have one schema."""
    return {"part": part, "number": number, "kind": kind, "note": note, "payload": payload}


def _decoded(part: int, found: ReadyBatch | ShardEnd) -> dict[str, Any]:
    if isinstance(found, ShardEnd):
        errors = [error.model_dump() for error in found.errors]
        note = {"batches": found.batches, "inputs": found.inputs, "errors": errors}
        return _row(part, -1, "end", json.dumps(note))
    note = {"shape": found.pixels.shape, "rows": [asdict(row) for row in found.rows]}
    return _row(part, found.number, "batch", json.dumps(note), found.pixels.tobytes())


def _ready(row: dict[str, Any]) -> ReadyBatch:
    note = json.loads(row["note"].as_py())
    pixels = np.frombuffer(row["payload"].as_buffer(), dtype=np.uint8).reshape(note["shape"])
    rows = [
        Row(**one | {"original_size": tuple(one["original_size"]), "captions": tuple(one["captions"])})
        for one in note["rows"]
    ]
    return ReadyBatch(row["number"].as_py(), pixels, tuple(rows))


def _piece(row: dict[str, Any]) -> Piece:
    part, kind = int(row["part"]), row["kind"]
    if kind == "table":
        return Piece(part, int(row["number"]), of_bytes(row["payload"]))
    if kind == "end":
        note = json.loads(row["note"])
        errors = tuple(BrokenImage(**error) for error in note["errors"])
        return Piece(part, end=ShardEnd(note["batches"], note["inputs"], errors))
    if kind == "denied":
        raise DeniedError(row["note"])
    return Piece(part, failed=row["note"])


def _configure(data: Any) -> None:
    """Few batches on their way, and not a word on the terminal."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK
    context.target_min_block_size = 1
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False


def _seen(ray: Any, address: str | None) -> Cluster:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return Cluster(address, int(total.get("CPU", 1)), int(total.get("GPU", 0)), max(1, largest), len(nodes))


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


def _store_bytes() -> int:
    """A fifth of the memory, or half of what shared memory has room for; at most `STORE`."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = Path("/dev/shm")
    room = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize // 2 if shared.is_dir() else pages
    return max(80 << 20, min(STORE, pages // 5, room))


def _short_folder() -> str | None:
    """Ray's sockets lie in it, and their paths may have 107 letters: a long TMPDIR is too long."""
    folder = tempfile.gettempdir()
    return str(Path(folder) / "ray") if len(folder) <= 40 else None


def _look_for(address: str) -> None:
    """Whether anybody is there: Ray itself would ask for minutes.

    Raises:
        QLIPError: nobody is.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "://" in address:  # Ray's client, through which none of this was tried
        raise QLIPError(f"--ray-address {address}: Ray's client is not supported; run on one of its machines with auto")
    if not host or not port.isdigit():
        raise QLIPError(f"--ray-address {address}: no address; write auto, or HOST:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, why: str) -> QLIPError:
    remedy = "check --ray-address, and set RAY_AUTH_MODE=token if it wants one"
    return QLIPError(f"no Ray cluster at {address} ({why}); {remedy}")


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


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__
