"""Signals that request a stop: SIGINT (Ctrl-C), a scheduler's SIGTERM, and SIGUSR1, SLURM's advance notice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from qlip.runtime.machine import STOP_SIGNALS

IGNORE_SECONDS = 20.0
"""Time to ignore signals after an error: long enough to report it, shorter than a launcher's kill timeout (30 s)."""
Handler = Callable[[int, FrameType | None], object] | int | None


class Signals:
    """Context manager that records the first signal to stop; a second signal raises KeyboardInterrupt.

    Restores the previous handlers on exit. Outside the main thread, where Python allows no handlers, it installs none.

    Args:
        log: called with one line when the first signal arrives.
        ignore_after_error: if the context ends with an error, ignore signals other than SIGINT for `IGNORE_SECONDS`:
            a launcher sends them when another rank fails, and this rank must still report its own error.
    """

    def __init__(self, log: Callable[[str], None], ignore_after_error: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._log, self._ignore_after_error = log, ignore_after_error
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ignore = error is not None and self._ignore_after_error
        for number, handler in self._previous.items():
            signal.signal(number, _Ignored(handler) if ignore and number != signal.SIGINT else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._log(f"{self.received.name}: saving after this step; a second signal stops immediately")


class _Ignored:
    """Handler that ignores the signal for `IGNORE_SECONDS`, then restores the previous handler."""

    def __init__(self, previous: Handler) -> None:
        self._previous, self._until = previous, time.monotonic() + IGNORE_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        if time.monotonic() >= self._until:
            signal.signal(number, self._previous)
            signal.raise_signal(number)
