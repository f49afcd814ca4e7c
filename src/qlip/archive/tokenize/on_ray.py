"""Engine on Ray Data: CPU tasks decode shards, actors run the model, this process writes the parts.

Ray retries what died: the shard of a reader, the batch of a model. `Run` knows each piece by shard and number, so a
piece that comes twice is written once. Batches wait in Ray's object store, which is small, and Ray pauses the readers
while it is full.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip.archive.dataset.layout import SkippedImage
from qlip.archive.tokenize.encoder import Encoder
from qlip.archive.tokenize.inputs import InputShard
from qlip.archive.tokenize.preprocess import ReadyBatch, Row, ShardEnd, Work, batches_of, from_bytes, to_bytes
from qlip.archive.tokenize.runner import Piece
from qlip.data.storage.retry import DeniedError
from qlip.errors import QLIPError, require
from qlip.runtime.machine import total_memory
from qlip.runtime.ray import RESUME, Cluster, first_line, import_ray, running

STORE = 1 << 30
"""Largest local object store in bytes."""
BLOCK = 8 << 20
"""Approximate bytes of batches per Ray block."""
MOST_BLOCKS = 10_000


def is_installed() -> bool:
    """Return whether Ray is installed."""
    return find_spec("ray") is not None


@contextmanager
def start_ray(address: str | None = None, workers: int = 1) -> Iterator[Cluster]:
    """Start Ray, or connect to an existing cluster, as long as the context lasts.

    Args:
        address: of a cluster, ``auto`` for this machine's, or None to start Ray here.
        workers: models to run at once; a Ray that is started here has room for them and a reader.

    Raises:
        QLIPError: Ray is not installed, cannot start, or there is no cluster there.
    """
    if address:
        _check(address)
    cpus = max(os.cpu_count() or 1, workers + 1)
    with running(address, cpus=cpus, object_store_bytes=_store_bytes()) as cluster:
        yield cluster


def encode_on_ray(
    todo: Sequence[tuple[int, InputShard]], work: Work, cluster: Cluster, workers: int
) -> Generator[Piece, None, None]:
    """Encode shards on Ray; yields pieces as they are ready. Close the generator before Ray stops.

    Args:
        todo: shards with their numbers.
        work: model, preprocessing and views.
        cluster: to run on.
        workers: models that run at once, each on its own GPU if the device is a GPU.

    Raises:
        QLIPError: workers keep dying, or the cluster is lost.
        DeniedError: access to an image is denied; all others would fail too.
    """
    ray, data = import_ray(), require("ray.data", extra="archive")
    _configure(data)
    on_gpu = work.info.device == "cuda"
    check_room(cluster, workers, on_gpu)
    rows = [{"part": part, "shard": shard} for part, shard in todo]
    encoded = (
        data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        .flat_map(_Decode(work), num_cpus=1)
        .map_batches(
            _Encode,
            fn_constructor_args=(work, cluster.threads_per_worker(workers)),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=workers),
            num_gpus=1 if on_gpu else 0,
            num_cpus=1,
        )
    )
    try:
        with closing(iter(encoded.iter_rows())) as found:  # stops Ray Data, before Ray
            for row in found:
                yield _piece(row)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, QLIPError):
            raise QLIPError(str(cause)) from None
        if isinstance(cause, ModuleNotFoundError):
            raise QLIPError(f"the cluster's machines lack {cause.name}; install qlip[archive] there") from None
        raise
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise QLIPError(f"Ray: {first_line(error)}; {RESUME}") from None


def check_room(cluster: Cluster, workers: int, on_gpu: bool) -> None:
    """Check that a cluster has room for so many models; Ray would wait for ever.

    Raises:
        QLIPError: it has not.
    """
    if on_gpu and cluster.gpus < workers:
        raise QLIPError(f"{workers} workers: the cluster has {cluster.gpus} GPUs; take as many workers, or the CPU")
    if cluster.cpus <= workers:  # each model takes one, and one must be left to read
        raise QLIPError(
            f"{workers} workers: the cluster has {cluster.cpus} CPUs, and one must be left to read; take fewer"
        )


class _Decode:
    """Task that turns a shard into rows: one for each ready batch, and one for its end."""

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
    """Actor with the model: encodes a batch of one row to a batch of one row."""

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
    """Make a row; all rows have one schema, as Ray's blocks need."""
    return {"part": part, "number": number, "kind": kind, "note": note, "payload": payload}


def _decoded(part: int, found: ReadyBatch | ShardEnd) -> dict[str, Any]:
    if isinstance(found, ShardEnd):
        errors = [error.model_dump() for error in found.errors]
        note = {
            "batches": found.batches,
            "inputs": found.inputs,
            "errors": errors,
            "text_faults": found.text_faults,
        }
        return _row(part, -1, "end", json.dumps(note))
    note = {"shape": found.pixels.shape, "rows": [asdict(row) for row in found.rows]}
    return _row(part, found.number, "batch", json.dumps(note), found.pixels.tobytes())


def _ready(row: dict[str, Any]) -> ReadyBatch:
    note = json.loads(row["note"].as_py())
    pixels = np.frombuffer(row["payload"].as_buffer(), dtype=np.uint8).reshape(note["shape"])
    rows = [
        Row(**one | {name: tuple(one[name]) for name in ("original_size", "captions", "extra")}) for one in note["rows"]
    ]
    return ReadyBatch(row["number"].as_py(), pixels, tuple(rows))


def _piece(row: dict[str, Any]) -> Piece:
    part, kind = int(row["part"]), row["kind"]
    if kind == "table":
        return Piece(part, int(row["number"]), from_bytes(row["payload"]))
    if kind == "end":
        note = json.loads(row["note"])
        errors = tuple(SkippedImage(**error) for error in note["errors"])
        end = ShardEnd(note["batches"], note["inputs"], errors, tuple(note["text_faults"]))
        return Piece(part, end=end)
    if kind == "denied":
        raise DeniedError(row["note"])
    return Piece(part, failed=row["note"])


def _configure(data: Any) -> None:
    """Limit the batches that Ray holds."""
    context = data.DataContext.get_current()
    context.target_max_block_size = BLOCK
    context.target_min_block_size = 1
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False


def _store_bytes() -> int:
    """Return a fifth of the memory, or half of the free shared memory; at most `STORE`."""
    memory = total_memory() or STORE
    shared = Path("/dev/shm")
    room = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize // 2 if shared.is_dir() else memory
    return max(80 << 20, min(STORE, memory // 5, room))


def _check(address: str) -> None:
    """Check a cluster's address. Raises QLIPError: a kind that is not supported."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise QLIPError(f"{address}: Ray's client is not supported; run on one of its machines with auto")
    if address != "auto" and not (host and port.isdigit()):
        raise QLIPError(f"{address}: no address of a Ray cluster; write auto, or HOST:6379")
