"""A measurement shared among Ray's workers: each computes chunks of passes, and one process gathers them.

A chunk's rows do not depend on who computes them (`qlip.evaluation.passes`), so Ray hands out chunks as workers come
free, a worker that is lost costs its last chunk, and a stopped run goes on, here or there. Rows lie in a folder that
all machines see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlip.data.sources import CaptionedImages
from qlip.errors import QLIPError, require
from qlip.evaluation.evaluator import checked
from qlip.evaluation.passes import claim, compute, missing
from qlip.evaluation.protocol import open_set
from qlip.evaluation.running import Item, Look, Outcome, looks, run_items
from qlip.evaluation.subjects import Subject
from qlip.evaluation.throughput import THROUGHPUT, can_be_timed

Opened = Callable[[str], CaptionedImages]
Opener = Callable[[], tuple[Subject, Opened]]
"""Opens the subject, and sets by their names, in each worker; it is pickled, the subject is not."""
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
STORE = 100 * 2**20
"""Bytes of the object store of a cluster that is started here; what passes through it are numbers of chunks."""


@dataclass(frozen=True)
class Cluster:
    """Where workers run.

    Attributes:
        workers: processes that measure.
        address: of a cluster that runs already; None starts one on this machine, and stops it in the end.
    """

    workers: int
    address: str | None = None


def run_on_ray(
    subject: Subject,
    items: Sequence[Item],
    *,
    opener: Opener,
    work: Path,
    cluster: Cluster,
    opened: Opened = open_set,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Measure everything as :func:`qlip.evaluation.running.run_items` does, each pass shared among workers.

    Args:
        subject: in eval mode; it gathers, and measures what is of no set.
        items: what to measure.
        opener: opens the very same in a worker, which gets a GPU where the subject here has one.
        work: keeps rows; every worker must see it under this path.
        cluster: where to run.
        opened: a set's pictures by its name, here.
        batch_size: of the passes.
        advance: called with the number of pictures done, stored ones included.

    Returns:
        The result, the same as one process gives.

    Raises:
        QLIPError: as `run_items`; no Ray, a cluster that does not start or cannot be reached, a worker that fails, or
            rows that do not arrive.
    """
    work, passes = work.absolute(), looks(items)
    for item in items:
        if item.evaluator == THROUGHPUT:
            can_be_timed(subject, item.settings)
    for look in passes:
        checked(look.evaluators, subject)
    chunks: list[dict[str, int]] = []
    for number, look in enumerate(passes):
        data = look.prepared(subject, opened(look.data))
        claim(subject, data, look.evaluators, work / look.slug, batch_size)
        todo = missing(data, work / look.slug)
        advance(len(data) - sum(map(len, todo.values())))
        chunks += [{"pass": number, "start": start, "count": len(part)} for start, part in todo.items()]
    if chunks:
        share = _Share(opener, tuple(items), work, batch_size, os.getcwd(), subject.device.type == "cuda")
        with _running(cluster) as ray:
            for done in _shared(ray, share, chunks, cluster.workers):
                advance(done)
    for look in passes:
        if missing(look.prepared(subject, opened(look.data)), work / look.slug):
            raise QLIPError(f"{work / look.slug}: workers' rows are not here; give an --output that all machines see")
    found = run_items(subject, items, work=work, batch_size=batch_size, opened=opened)
    assert found is not None
    return found


@dataclass(frozen=True)
class _Share:
    """What a worker is told."""

    opener: Opener
    items: tuple[Item, ...]
    work: Path
    batch_size: int
    here: str
    gpu: bool


class _Worker:
    """One of Ray's: opens the subject once, and computes chunks that it is given."""

    def __init__(self, share: _Share) -> None:
        if os.path.isdir(share.here):
            os.chdir(share.here)  # paths of sets may be relative
        self.share, self.fault = share, ""
        try:
            self.subject, self.opened = share.opener()
            self.passes = looks(share.items)
            for look in self.passes:
                checked(look.evaluators, self.subject)
        except QLIPError as error:
            self.fault = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Chunks, each by its pass and first position; gives numbers of pictures done, and what went wrong."""
        for number, start in zip(batch["pass"].tolist(), batch["start"].tolist(), strict=True):
            try:
                if not self.fault:
                    self._compute(self.passes[number], start)
            except QLIPError as error:
                self.fault = str(error)
        return {"count": batch["count"], "fault": np.array([self.fault] * len(batch["count"]))}

    def _compute(self, look: Look, start: int) -> None:
        share, folder = self.share, self.share.work / look.slug
        data = look.prepared(self.subject, self.opened(look.data))
        claim(self.subject, data, look.evaluators, folder, share.batch_size)  # refuses another model or set
        compute(self.subject, data, look.evaluators, folder, [start], share.batch_size)


def _shared(ray: Any, share: _Share, chunks: list[dict[str, int]], workers: int) -> Iterator[int]:
    """Numbers of pictures as they are done."""
    data = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _Worker,
        fn_constructor_args=(share,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
        num_cpus=1,
        num_gpus=1 if share.gpu else 0,
    )
    try:
        for row in data.iter_rows():
            if row["fault"]:
                raise QLIPError(str(row["fault"]))
            yield int(row["count"])
    except ray.exceptions.RayError as error:
        line = " ".join(str(error).split())[:200]
        raise QLIPError(f"Ray: a worker failed ({line}); what is done is kept, run it again") from None


@contextlib.contextmanager
def _running(cluster: Cluster) -> Iterator[Any]:
    """Ray, quiet; a cluster of one's own is stopped in the end, one that was running goes on."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray = require("ray", extra="archive")
    require("ray.data", extra="archive")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mine = not ray.is_initialized()
    if mine:
        _start(ray, cluster)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


def _start(ray: Any, cluster: Cluster) -> None:
    own = {"num_cpus": cluster.workers, "include_dashboard": False, "object_store_memory": STORE}
    try:
        if cluster.address is not None:
            _knock(cluster.address)
        with _silence():
            where = own if cluster.address is None else {"address": cluster.address}
            ray.init(**where, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        what = "does not start" if cluster.address is None else f"cannot be reached at {cluster.address}"
        raise QLIPError(f"Ray {what} ({line}); measure without --ray-workers, or under torchrun") from None


def _knock(address: str) -> None:
    """Whether anybody is there at all; Ray itself asks for minutes. What is no HOST:PORT is left to it."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing that libraries in other languages print, either."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
