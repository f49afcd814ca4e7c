"""Processes that read and decode ahead of whoever consumes: torch's DataLoader as this room uses it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from qlip.errors import QLIPError

Collated = TypeVar("Collated")
Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)

PRELOADED = "qlip.data.loader.stream"
"""Imported once in the fork server, so that each worker is a cheap fork."""

NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of a terminal or a scheduler, which send them to all processes of a group: to workers that are still starting too."""


class Reader(Protocol[Item_co]):
    """Something read by several workers in turn; it pickles, to run in them."""

    def items(self, worker: int, workers: int) -> Iterator[Item_co]:
        """Items number `worker`, `worker` + `workers`, ... of an endless row."""


@dataclass(frozen=True)
class _Failed:
    """A `QLIPError` on its way out of a worker, whose traceback says nothing to anybody."""

    message: str


class _Row(IterableDataset[Any], Generic[Item]):
    """A reader as torch wants it."""

    def __init__(self, reader: Reader[Item]) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Item | _Failed]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            yield from self.reader.items(worker, workers)
        except QLIPError as error:
            while True:  # the others' items before this one come first
                yield _Failed(str(error))


def in_turn(reader: Reader[Item], num_workers: int, prefetch: int) -> Iterator[Item]:
    """The reader's endless row of items, read by `num_workers` processes, 0 of them meaning this one.

    Workers end with the iterator, which ``close()`` ends.

    Args:
        reader: of the row.
        num_workers: processes.
        prefetch: items that each keeps ready.

    Raises:
        QLIPError: raised by the reader, when its item's turn comes, or a worker was killed.
    """
    loaded = _loader(_Row(reader), num_workers, prefetch, batch_size=None, collate_fn=_as_it_is)
    iterator = iter(loaded)
    try:
        while True:
            item = next(iterator)
            if isinstance(item, _Failed):
                raise QLIPError(item.message)
            yield cast(Item, item)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "it may have run out of memory: lower data.num_workers or data.prefetch"
        raise QLIPError(f"data: a loader's process ended ({str(error).splitlines()[0]}); {remedy}") from None
    finally:
        del iterator


def loader(
    dataset: Dataset[Any],
    positions: Iterable[list[int]],
    collate: Callable[[Sequence[Any]], Collated],
    num_workers: int,
    prefetch: int,
) -> Iterable[Collated]:
    """Batches of a map from positions to samples.

    Args:
        dataset: the map.
        positions: of each batch.
        collate: makes a batch of samples, in the worker.
        num_workers: processes; 0 reads here.
        prefetch: batches that each keeps ready.
    """
    return _loader(dataset, num_workers, prefetch, batch_sampler=positions, collate_fn=collate)


def _loader(dataset: Dataset[Any], num_workers: int, prefetch: int, **how: Any) -> DataLoader[Any]:
    """Workers come from a fork server: forking a process whose torch, progress bar and log threads hold locks can hang.

    The generator is its own: loading never moves the global one, which a resumed run restores.
    """
    context = None
    if num_workers > 0:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        _start_fork_server()
    return DataLoader(
        dataset,
        num_workers=num_workers,
        generator=torch.Generator(),
        multiprocessing_context=context,
        prefetch_factor=prefetch if num_workers > 0 else None,
        worker_init_fn=prepare_worker if num_workers > 0 else None,
        **how,
    )


def _start_fork_server() -> None:
    """It and its children are born deaf to notices: whoever trains decides when they are no longer needed."""
    resource_tracker.ensure_running()  # it unblocks what it finds blocked, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(worker: int) -> None:
    """A worker computes with one thread, leaves signals to its parent, which saves first, and ends when that ends."""
    del worker
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _as_it_is(item: Any) -> Any:
    return item


def _end_with_parent() -> None:
    """torch watches the process that forked a worker: the fork server, which in turn lives as long as its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_when_parent_says() -> None:
    """Of the notices, which are blocked here, only the parent's own counts."""
    parent = multiprocessing.parent_process()
    while True:
        notice = signal.sigwaitinfo(NOTICES)
        if parent is None or notice.si_pid == parent.pid:
            os._exit(128 + notice.si_signo)
