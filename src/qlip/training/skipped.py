"""Samples of a run that could not be read: which, how often, and whether they are too many.

An image that is broken comes again in every epoch. `SkippedSamples` counts it once, and stores its name with the
checkpoints, so that a resumed run neither counts nor prints it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qlip.training.parallel.faults import CollectiveError

TOLERATED = 100
"""Images that a limit given as a share always tolerates."""
MAX_NAMED = 10_000
"""Images stored by name; later ones are counted each time they come."""
NAMES_SHOWN = 10


class SkippedSamples:
    """Samples that could not be read, over all ranks.

    Args:
        limit: number of images, or, below 1, a share of the samples read, but at least `TOLERATED` images.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.events = self._unnamed = 0
        self._named: dict[tuple[str, str], list[Any]] = {}  # (source, key) -> [reason, times]

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self._named) + self._unnamed

    def add(self, found: Iterable[Sequence[str]]) -> list[str]:
        """Count samples, (key, source, reason) each; return one line for each image that is new."""
        lines = []
        for key, source, reason in found:
            self.events += 1
            if (entry := self._named.get((source, key))) is not None:
                entry[1] += 1
            elif len(self._named) < MAX_NAMED:
                self._named[source, key] = [reason, 1]
                lines.append(f"skipped image {len(self._named)}: {key} of {source}: {reason}")
            else:
                self._unnamed += 1
        return lines

    def check(self, samples: int) -> None:
        """Refuse too many of them.

        Args:
            samples: number of samples of the run that could be read.

        Raises:
            CollectiveError: more than the limit.
        """
        read = samples + self.events
        tolerated = self.limit if self.limit >= 1 or not self.limit else max(TOLERATED, self.limit * read)
        if self.images <= tolerated:
            return
        limit = f"{self.limit:g}" if tolerated == self.limit else f"{self.limit:g} of the {read:,} samples read"
        raise CollectiveError(
            f"{self._counted()} cannot be read, the limit is {limit} (skip_limit);"
            f" the last was {self._last()}; repair or remove them, or raise skip_limit"
        )

    def check_any(self, samples: int) -> None:
        """Raise CollectiveError if not one sample could be read."""
        if self.events and not samples:
            raise CollectiveError(
                f"none of the {self.events:,} samples so far could be read, so nothing is trained; the last was"
                f" {self._last()}"
            )

    def _counted(self) -> str:
        return f"{self.images:,} image{'s' if self.images != 1 else ''}"

    def _last(self) -> str:
        (source, key), (reason, _) = next(reversed(self._named.items()))
        return f"{key} of {source}: {reason}"

    def summary(self) -> list[str]:
        """How many samples were skipped, and which images; empty if none."""
        if not self.events:
            return []
        lines = [f"skipped {self.events:,} samples of {self._counted()} that could not be used:"]
        named = list(self._named.items())
        lines += [f"  {key} of {source}: {reason}" for (source, key), (reason, _) in named[:NAMES_SHOWN]]
        if len(named) > NAMES_SHOWN:
            lines.append(f"  and {len(named) - NAMES_SHOWN:,} more, listed in the checkpoint's training/state.json")
        return lines

    def state(self) -> dict[str, Any]:
        """State as a JSON object."""
        named = [[source, key, *entry] for (source, key), entry in self._named.items()]
        return {"named": named, "unnamed": self._unnamed}

    def load(self, state: dict[str, Any] | None, events: int) -> None:
        """Restore :meth:`state`; a checkpoint of version 0.1 has only the number of events."""
        self.events = events
        if state is not None:
            self._unnamed = state["unnamed"]
            self._named = {(source, key): [reason, times] for source, key, reason, times in state["named"]}
