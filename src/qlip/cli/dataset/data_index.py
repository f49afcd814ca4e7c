"""`qlip data index`: index files of tar shards, for random access and exact counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli.console import Failures, plural, print_json, progress, show, stoppable
from qlip.cli.options import Json
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.data.shards.build_index import BuiltIndex
    from qlip.data.storage.storage import Storage

MB = 1_000_000


def index(
    patterns: Annotated[
        list[str],
        typer.Argument(metavar="PATTERN...", help="Tar files: paths or addresses, with braces ({000..012}) or *."),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the index files; default: beside each tar."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-j", min=1, help="Number of tars to read in parallel.")] = 4,
    force: Annotated[bool, typer.Option("--force", help="Also rebuild index files that are up to date.")] = False,
    as_json: Json = False,
) -> None:
    """Index tar shards, for exact counts and random access without reading them again.

    Each index is NAME.index beside its tar, or in -o FOLDER; a recipe's source then needs the line index: FOLDER.
    Index files that are up to date are kept; the index of a tar that changed is rebuilt.
    """
    from qlip.data.shards.indexed import refuse_equal_names
    from qlip.data.shards.shard_patterns import expand
    from qlip.data.storage.storage import Storage

    storage = Storage()
    shards = [shard for pattern in patterns for shard in expand(pattern, storage)]
    if output is not None:
        refuse_equal_names(shards)
    failures = Failures()
    with stoppable("finished indexes are kept; run the same command to continue"):
        done = _index_all(shards, storage, output, workers, force, failures)
    order = {shard: number for number, shard in enumerate(shards)}
    done.sort(key=lambda one: order[one.shard])
    if as_json:
        print_json({"results": [asdict(one) for one in done], "failures": failures.found})
    else:
        made = sum(one.made for one in done)
        samples = sum(one.samples for one in done)
        show(
            f"{plural(len(done), 'shard')}, {plural(samples, 'sample')}: {made} indexed, {len(done) - made} up to date"
        )
    failures.finish(len(shards), "shard")


def _index_all(
    shards: list[str], storage: Storage, output: str | None, workers: int, force: bool, failures: Failures
) -> list[BuiltIndex]:
    from qlip.data.shards.build_index import build_index

    sizes: dict[str, int] = {}
    for shard in shards:
        try:
            sizes[shard] = storage.size(shard)
        except QLIPError as error:
            failures.add(shard, error)
    stopped, done = threading.Event(), []
    with progress("indexing (MB)", max(2, sum(sizes.values()) // MB)) as bar, ThreadPoolExecutor(workers) as pool:
        progressed = _ByteProgress(bar.advance)
        futures: dict[Future[BuiltIndex], str] = {
            pool.submit(build_index, shard, storage, output, force, progressed.callback(shard, stopped)): shard
            for shard in sizes
        }
        try:
            for future in as_completed(futures):
                shard = futures[future]
                try:
                    done.append(future.result())
                except QLIPError as error:
                    failures.add(shard, error)
                progressed.update(shard, sizes[shard])
        finally:  # on Ctrl-C the threads stop at their next sample
            stopped.set()
            for future in futures:
                future.cancel()
    return done


class _Stopped(Exception):
    """Raised in a thread to end it after Ctrl-C."""


class _ByteProgress:
    """Sums the progress of all shards and reports it in whole megabytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._lock = advance, threading.Lock()
        self._offsets: dict[str, int] = {}
        self._total = self._shown = 0

    def callback(self, shard: str, stopped: threading.Event) -> Callable[[int], None]:
        """Progress callback of one shard."""

        def tick(offset: int) -> None:
            if stopped.is_set():
                raise _Stopped
            self.update(shard, offset)

        return tick

    def update(self, shard: str, offset: int) -> None:
        """Record that the bytes of a shard up to `offset` were read."""
        with self._lock:
            self._total += offset - self._offsets.get(shard, 0)
            self._offsets[shard] = offset
            steps = self._total // MB - self._shown
            if steps > 0:
                self._advance(steps)
                self._shown += steps
