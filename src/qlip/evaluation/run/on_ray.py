"""A measurement shared among Ray's workers: each computes chunks of passes, and one process gathers them.

A chunk's rows do not depend on who computes them (`qlip.evaluation.run.evaluate_dataset`), so Ray hands out chunks as
workers come
free, a worker that is lost costs its last chunk, and a stopped run goes on, here or there. Rows lie in a folder that
all machines see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip.data.sources.base import CaptionedImages
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import checked
from qlip.evaluation.evaluators.throughput import THROUGHPUT, can_be_timed
from qlip.evaluation.models.base import Subject
from qlip.evaluation.run.datasets import open_set
from qlip.evaluation.run.evaluate import Item, Look, Outcome, looks, run_items
from qlip.evaluation.run.evaluate_dataset import claim, compute, missing
from qlip.runtime.ray import Cluster as Machines
from qlip.runtime.ray import Wording, quiet, running, seen

Opened = Callable[[str], CaptionedImages]
Opener = Callable[[], tuple[Subject, Opened]]
"""Opens the subject, and sets by their names, in each worker; it is pickled, the subject is not."""
STORE = 100 * 2**20
"""Bytes of the object store of a cluster that is started here; what passes through it are numbers of chunks."""
WORDING = Wording(
    option="--ray-workers",
    no_start="Ray does not start ({why}); measure without --ray-workers, or under torchrun",
    no_cluster="Ray cannot be reached at {address} ({why}); measure without --ray-workers, or under torchrun",
    goes_on="what is done is kept, run it again",
)


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
    """Measure everything as :func:`qlip.evaluation.run.evaluate.run_items` does, each pass shared among workers.

    Args:
        subject: in eval mode; it gathers, and measures what is of no set.
        items: what to measure.
        opener: opens the very same in a worker, which gets a GPU where the subject here has one.
        work: keeps rows; every worker must see it under this path.
        cluster: where to run.
        opened: a set's images by its name, here.
        batch_size: of the passes.
        advance: called with the number of images done, stored ones included.

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
        ray, workers, gpu = quiet(), min(cluster.workers, len(chunks)), subject.device.type == "cuda"
        with _running(ray, cluster) as there:
            if gpu:
                there.check_gpus(workers, WORDING.option)
            threads = there.threads_each(workers)
            share = _Share(opener, tuple(items), work, batch_size, os.getcwd(), gpu, threads)
            with closing(_shared(ray, share, chunks, workers)) as shared:
                for done in shared:
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
    threads: int


class _Worker:
    """One of Ray's: opens the subject once, and computes chunks that it is given."""

    def __init__(self, share: _Share) -> None:
        if os.path.isdir(share.here):
            os.chdir(share.here)  # paths of sets may be relative
        torch.set_num_threads(share.threads)
        self.share, self.fault = share, ""
        try:
            self.subject, self.opened = share.opener()
            self.passes = looks(share.items)
            for look in self.passes:
                checked(look.evaluators, self.subject)
        except QLIPError as error:
            self.fault = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Chunks, each by its pass and first position; gives numbers of images done, and what went wrong."""
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


def _shared(ray: Any, share: _Share, chunks: list[dict[str, int]], workers: int) -> Generator[int, None, None]:
    """Numbers of images as they are done."""
    data = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _Worker,
        fn_constructor_args=(share,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=1 if share.gpu else 0,
    )
    try:
        with closing(iter(data.iter_rows())) as rows:  # stops Ray Data, which must be before Ray
            for row in rows:
                if row["fault"]:
                    raise QLIPError(str(row["fault"]))
                yield int(row["count"])
    except ray.exceptions.RayError as error:
        line = " ".join(str(error).split())[:200]
        raise QLIPError(f"Ray: a worker failed ({line}); {WORDING.goes_on}") from None


@contextmanager
def _running(ray: Any, cluster: Cluster) -> Iterator[Machines]:
    """A cluster of one's own is stopped in the end, one that was running goes on."""
    if ray.is_initialized():
        yield seen(ray, cluster.address)
        return
    cpus = max(os.cpu_count() or 1, cluster.workers)
    with running(cluster.address, WORDING, cpus=cpus, store=STORE) as there:
        yield there
