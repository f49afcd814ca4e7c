"""Worker processes that read and decode ahead: torch's DataLoader as this package uses it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from qlip.errors import QLIPError
from qlip.runtime.machine import STOP_SIGNALS

Collated = TypeVar("Collated")
Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)

PRELOADED = "qlip.data.loader.stream"
"""Module that the fork server imports once, so that each worker is a cheap fork."""

FORK_SERVER = hasattr(signal, "pthread_sigmask")
"""False on Windows, which starts each worker from nothing."""


class Reader(Protocol[Item_co]):
    """A source of items for several workers; it pickles, to run in them."""

    def items(self, worker: int, workers: int) -> Iterator[Item_co]:
        """Iterate over items number `worker`, `worker` + `workers`, ... of an endless sequence."""


@dataclass(frozen=True)
class _Failed:
    """A `QLIPError` that a worker sends to its parent, without the traceback that torch would add."""

    message: str


class _ItemStream(IterableDataset[Any], Generic[Item]):
    """Dataset of a DataLoader that reads from a `Reader`."""

    def __init__(self, reader: Reader[Item]) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Item | _Failed]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            yield from self.reader.items(worker, workers)
        except QLIPError as error:
            while True:  # earlier items of the other workers come first
                yield _Failed(str(error))


def round_robin_workers(reader: Reader[Item], num_workers: int, prefetch: int) -> Generator[Item, None, None]:
    """Iterate over a reader's items, made by worker processes in round-robin order.

    Workers end with the iterator; its ``close()`` ends them.

    Args:
        reader: makes the items.
        num_workers: processes; 0 makes the items in this one.
        prefetch: items that each worker keeps ready.

    Raises:
        QLIPError: the reader raised it (raised here when its item is due), or a worker was killed.
    """
    loaded = _loader(_ItemStream(reader), num_workers, prefetch, batch_size=None, collate_fn=_identity)
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
        raise QLIPError(f"data: a loader process ended ({str(error).splitlines()[0]}); {remedy}") from None
    finally:
        del iterator


def loader(
    dataset: Dataset[Any],
    positions: Iterable[list[int]],
    collate: Callable[[Sequence[Any]], Collated],
    num_workers: int,
    prefetch: int,
) -> Iterable[Collated]:
    """Make a DataLoader of batches from a map of positions to samples.

    Args:
        dataset: the map.
        positions: of each batch.
        collate: makes a batch of samples, in the worker.
        num_workers: processes; 0 reads in this one.
        prefetch: batches that each worker keeps ready.
    """
    return _loader(dataset, num_workers, prefetch, batch_sampler=positions, collate_fn=collate)


def _loader(dataset: Dataset[Any], num_workers: int, prefetch: int, **how: Any) -> DataLoader[Any]:
    """Make a DataLoader with workers from a fork server and without effect on the global RNG state.

    Forking this process itself could hang, since threads of torch, of a progress bar or of a log may hold locks. The
    loader has its own generator, so that loading never advances the global one, which a resumed run restores.
    """
    context = None
    if num_workers > 0:
        context = torch.multiprocessing.get_context("forkserver" if FORK_SERVER else "spawn")
        if FORK_SERVER:
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
    """Start the fork server with stop signals blocked for it and its children: only the parent ends workers.

    A terminal or a scheduler sends these signals to all processes of a group, including workers that still start.
    """
    resource_tracker.ensure_running()  # it unblocks these signals, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(worker: int) -> None:
    """Set up a worker: one thread, signals left to its parent, which saves first, and an end together with it."""
    del worker
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if FORK_SERVER:
        threading.Thread(target=_end_on_signal_of_parent, daemon=True).start()


def _identity(item: Any) -> Any:
    return item


def _end_with_parent() -> None:
    """End with the parent. torch watches only the fork server, which lives as long as its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_on_signal_of_parent() -> None:
    """End on a signal of the parent; the same signal from elsewhere is ignored.

    macOS does not tell the sender of a signal: there a worker ends on SIGTERM, which is what its parent sends.
    """
    parent = multiprocessing.parent_process()
    while True:
        if hasattr(signal, "sigwaitinfo"):
            notice = signal.sigwaitinfo(STOP_SIGNALS)
            number, of_parent = notice.si_signo, parent is None or notice.si_pid == parent.pid
        else:
            number = signal.sigwait(STOP_SIGNALS)
            of_parent = number == signal.SIGTERM
        if of_parent:
            os._exit(128 + number)
