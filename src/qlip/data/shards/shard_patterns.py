"""Patterns of shards: braces as in a shell, and globs, on local disks and in remote storage."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

from qlip.data.storage.storage import Storage, is_remote, local_path
from qlip.errors import QLIPError

MAX_SHARDS = 1_000_000


def expand(pattern: str, storage: Storage | None = None) -> list[str]:
    """Expand a pattern to addresses: braces (``{000..012}`` keeps its zeros), then globs, whose matches are sorted.

    In an address such as ``s3://bucket/x-*.tar`` only ``*`` makes a glob; ``?`` and ``[`` are ordinary characters.

    Raises:
        QLIPError: nothing matches a glob, a range runs backwards, or there are too many shards.
    """
    storage = storage or Storage()
    paths: list[str] = []
    for path in _braces(pattern):
        if _is_glob(path):
            found = storage.glob(path)
            if not found:
                raise QLIPError(f"{path}: no such file; the pattern matches nothing")
            paths.extend(found)
        else:
            paths.append(path)
        if len(paths) > MAX_SHARDS:
            raise QLIPError(f"{pattern}: matches more than {MAX_SHARDS} files; check its ranges")
    return paths


def _is_glob(path: str) -> bool:
    if is_remote(path):
        return "*" in path
    return glob.has_magic(path) and not os.path.exists(local_path(path))


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    if choices is None:
        if int(last) < int(first):
            raise QLIPError(f"{pattern}: the range {match.group()} runs backwards; write {{{last}..{first}}}")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts: Iterator[str] = (str(number).zfill(width) for number in range(int(first), int(last) + 1))
    else:
        parts = iter(choices.split(","))
    for part in parts:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])
