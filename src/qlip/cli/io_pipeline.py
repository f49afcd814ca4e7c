"""Reading and writing in threads while the model computes: `read_ahead`, `in_batches`, `WriteBehind`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from qlip.cli.console import Failures
from qlip.cli.inputs import Input
from qlip.errors import QLIPError

Loaded = TypeVar("Loaded")
Item = TypeVar("Item")
Named = TypeVar("Named", Input, Path)

THREADS = min(4, os.cpu_count() or 1)


def read_ahead(
    inputs: Sequence[Named], load: Callable[[Named], Loaded], failures: Failures, depth: int = 32
) -> Iterator[tuple[Named, Loaded]]:
    """Yield each input and its loaded form in order, reading up to ``depth`` ahead; report and skip broken inputs."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
    waiting: deque[tuple[Named, Future[Loaded]]] = deque()
    rest = iter(inputs)
    try:
        while True:
            while len(waiting) < depth and (item := next(rest, None)) is not None:
                waiting.append((item, pool.submit(load, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                loaded = future.result()
            except (QLIPError, OSError) as error:
                failures.add(item if isinstance(item, Path) else item.path, error)
                continue
            yield item, loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_batches(stream: Iterable[Item], size: int, shape: Callable[[Item], Hashable]) -> Iterator[list[Item]]:
    """Yield lists of up to ``size`` items of equal shape, in order within each shape."""
    waiting: dict[Hashable, list[Item]] = {}
    for item in stream:
        batch = waiting.setdefault(shape(item), [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(shape(item))
    yield from waiting.values()


class WriteBehind:
    """Runs writers in threads with at most ``depth`` pending; leaving the context waits for all of them.

    After Ctrl-C, everything that was submitted is still written.
    """

    def __init__(self, failures: Failures, done: Callable[[Input], None], depth: int = 32) -> None:
        self._failures, self._done, self._depth = failures, done, depth
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        self._waiting: deque[tuple[Input, Future[None]]] = deque()

    def submit(self, item: Input, write: Callable[[], None]) -> None:
        """Run a writer of the result of ``item``; its error is reported with the input's name."""
        self._waiting.append((item, self._pool.submit(write)))
        while len(self._waiting) > self._depth:
            self._settle()

    def _settle(self) -> None:
        item, future = self._waiting.popleft()
        try:
            future.result()
        except (QLIPError, OSError) as error:
            self._failures.add(item.path, error)
        else:
            self._done(item)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._waiting:
            self._settle()
        self._pool.shutdown(wait=True)
