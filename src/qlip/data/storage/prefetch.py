"""Spans of remote files, fetched by threads before they are needed, and cached while they may be needed again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future

from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

Span = tuple[str, int, int]
"""Address, begin and end."""


class Prefetcher:
    """Cache of spans that are fetched in the background; pickles empty into workers.

    It holds the spans of the last two calls of `prefetch`, and the last `keep` spans besides.

    Args:
        storage: reads.
        keep: number of spans to keep for later reads.
    """

    def __init__(self, storage: Storage, keep: int) -> None:
        self.storage, self.keep = storage, keep
        self._spans: OrderedDict[Span, Future[bytes]] = OrderedDict()
        self._announced: deque[set[Span]] = deque(maxlen=2)

    def __reduce__(self) -> tuple[type[Prefetcher], tuple[Storage, int]]:
        return Prefetcher, (self.storage, self.keep)

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Begin to fetch spans that are needed soon."""
        announced = dict.fromkeys(spans)
        self._announced.append(set(announced))
        for span in announced:
            self._begin(span)
        self._drop_old()

    def get(self, span: Span) -> bytes:
        """The bytes of a span. Raises QLIPError as `Storage.read`; the next call then fetches it again."""
        future = self._begin(span)
        self._drop_old(span)
        try:
            return future.result()
        except QLIPError:
            self._spans.pop(span, None)
            raise

    def close(self) -> None:
        """Cancel what was not fetched yet."""
        for future in self._spans.values():
            future.cancel()
        self._spans.clear()

    def _begin(self, span: Span) -> Future[bytes]:
        address, begin, end = span
        if span not in self._spans:
            self._spans[span] = self.storage.prefetch(address, begin, end - begin)
        self._spans.move_to_end(span)
        return self._spans[span]

    def _drop_old(self, *used: Span) -> None:
        if len(self._spans) <= self.keep:
            return
        needed = set(used).union(*self._announced)
        for span in [one for one in self._spans if one not in needed][: len(self._spans) - self.keep]:
            self._spans.pop(span).cancel()
