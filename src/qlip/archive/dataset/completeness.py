"""Parts that a dataset was to hold and does not.

``source.json`` names the input shards of a tokenised dataset, one part each. A dataset that was merged, split or
sampled is whole once its ``manifest.jsonl`` is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from qlip.archive.dataset.layout import MANIFEST, SOURCE, Entry, Layout
from qlip.archive.dataset.provenance import SourceRecord
from qlip.data.storage.storage import is_remote
from qlip.errors import QLIPError, QLIPWarning


class PartialDatasetError(QLIPError):
    """A dataset lacks parts, and the caller did not allow that."""


@dataclass(frozen=True)
class MissingParts:
    """Parts that a dataset lacks; true if there are any, or if its run has not ended.

    Attributes:
        parts: their numbers.
        expected: parts of the whole dataset; None if only the end of the run is known to be missing.
        images: images of the missing parts, if known.
        ended: the run wrote its manifest.
    """

    parts: tuple[int, ...] = ()
    expected: int | None = None
    images: int | None = None
    ended: bool = True

    def __bool__(self) -> bool:
        return bool(self.parts) or (self.expected is None and not self.ended)

    def __str__(self) -> str:
        if not self.parts:
            return "its run has not ended; run the same command again"
        images = "" if not self.images else f" with {self.images:,} images"
        of = "" if self.expected is None else f" of its {self.expected:,}"
        parts = "part" if (self.expected or len(self.parts)) == 1 else "parts"
        verb = "is" if len(self.parts) == 1 else "are"
        return (
            f"{len(self.parts):,}{of} {parts} {verb} missing{images}, the first is part {self.parts[0]}; run the"
            " command that made the dataset again"
        )


def missing_parts(layout: Layout, entries: Sequence[Entry], *, check_files: bool = True) -> MissingParts:
    """Compare a dataset with the record of its source.

    Args:
        layout: of the dataset.
        entries: its manifest.
        check_files: on this machine's disk, count a part as missing if its file is missing or has another size than
            the manifest says. In a store that would be a request per part.
    """
    storage, source = layout.storage, layout.path(SOURCE)
    ended = storage.exists(layout.path(MANIFEST))
    shards = SourceRecord.shards_in(storage.read(source)) if storage.exists(source) else None
    known = {entry.part for entry in entries}
    found = known if is_remote(layout.address) or not check_files else set(layout.present(entries))
    if shards is None:
        return MissingParts(tuple(sorted(known - found)), None, None, ended)
    missing = tuple(sorted((known | set(range(len(shards)))) - found))
    counts = [shards[part].images for part in missing if part < len(shards)]
    images = None if None in counts else sum(count for count in counts if count is not None)
    return MissingParts(missing, len(shards), images, ended)


def warn_if_partial(layout: Layout, entries: Sequence[Entry]) -> MissingParts:
    """Return the parts that a dataset lacks, with a warning if there are any."""
    missing = missing_parts(layout, entries)
    if missing:
        warnings.warn(f"{layout.address}: {missing}", QLIPWarning, stacklevel=3)
    return missing


def check_whole(layout: Layout, entries: Sequence[Entry], allow_partial: bool) -> None:
    """Refuse a dataset that lacks parts.

    Raises:
        PartialDatasetError: it does, and `allow_partial` is false.
    """
    if not allow_partial and (missing := missing_parts(layout, entries)):
        raise PartialDatasetError(f"{layout.address}: {missing}, or allow a partial dataset")
