"""Asked to stop: Ctrl-C, a scheduler's SIGTERM, and SIGUSR1, SLURM's notice before it takes the machine away."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
DEAF = 20.0
"""Seconds after an error: more than it takes to say it, less than a launcher waits before it kills (torchrun: 30)."""
Handler = Callable[[int, FrameType | None], object] | int | None


class Signals:
    """Remembers the first signal that asked to stop; a second one stops at once (KeyboardInterrupt).

    A context manager; former handlers come back afterwards. Outside the main thread, where Python allows no handlers,
    it hears nothing.

    Args:
        say: called with one line when the first arrives.
        deaf_on_error: where the context ends with an error, schedulers' signals are ignored for `DEAF` seconds: a
            launcher that saw another rank fall sends them, and this one still has to say why it ends.
    """

    def __init__(self, say: Callable[[str], None], deaf_on_error: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._say, self._deaf_on_error = say, deaf_on_error
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        deaf = error is not None and self._deaf_on_error
        for number, handler in self._previous.items():
            signal.signal(number, _Deaf(handler) if deaf and number != signal.SIGINT else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._say(f"{self.received.name}: saving after this step; once more stops at once")


class _Deaf:
    """A handler that hears nothing for a while, and afterwards gives way to the one that was there before."""

    def __init__(self, former: Handler) -> None:
        self._former, self._until = former, time.monotonic() + DEAF

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        if time.monotonic() >= self._until:
            signal.signal(number, self._former)
            signal.raise_signal(number)
