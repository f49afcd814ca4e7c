"""A token dataset as tar shards that the webdataset library reads: a `.qlip` file, words and json for each row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.layout import Layout, digest, part_name
from qlip.archive.manage.decode import file_names
from qlip.data.storage.storage import Storage
from qlip.runtime.progress import OnProgress, no_progress
from qlip.tokens import TokenFile

RECORD = "export.json"
AT_ONCE = 256
"""Rows in memory at a time."""


def export(
    dataset: TokenDataset, folder: str, *, storage: Storage | None = None, on_progress: OnProgress = no_progress
) -> int:
    """Write a tar for each part; run again after a stop, it writes the missing ones. Equal datasets, equal bytes.

    In a tar each row has KEY.qlip, as `qlip encode` writes, KEY.json (key, view, grid, sizes, captions, label) and,
    where it has words, KEY.txt, its first caption or its label. The library cuts names at the first dot, so those in
    keys become ``_``, and a name that is taken by then gets ``~`` and the row's number; the json has the key as it was.

    Args:
        dataset: to export.
        folder: path or address.
        storage: writes.
        on_progress: called with the rows of each part.

    Returns:
        How many tars the folder holds.

    Raises:
        QLIPError: the folder holds another export, or cannot be written.
    """
    plan = {"webdataset": digest(dataset.entries)}
    work = Layout(folder, storage).workspace(plan, of="export", record=RECORD)
    work.claim()
    first = 0
    for entry in dataset.entries:
        rows, name = range(first, first + entry.rows), f"{part_name(entry.part)}.tar"
        if not work.done(name):
            with work.writing(name) as path, tarfile.open(path, "w") as tar:
                _fill(tar, dataset, rows)
        first = rows.stop
        on_progress(entry.rows)
    return len(dataset.entries)


def _fill(tar: tarfile.TarFile, dataset: TokenDataset, rows: range) -> None:
    import numpy as np

    names = _without_dots(file_names(dataset, np.arange(rows.start, rows.stop)), rows.start)
    for start in range(rows.start, rows.stop, AT_ONCE):
        for row in dataset.rows(range(start, min(start + AT_ONCE, rows.stop))):
            name = next(names)
            _add(tar, f"{name}.qlip", _token_file(dataset, row).to_bytes())
            _add(tar, f"{name}.json", json.dumps(_record(row), ensure_ascii=False).encode())
            words = next(iter(row.captions), row.label)
            if words:
                _add(tar, f"{name}.txt", words.encode())


def _without_dots(names: Iterator[str], first: int) -> Iterator[str]:
    """The names of rows from `first` on, each another: what has one name is one sample to the library."""
    taken = set[str]()
    for row, name in enumerate(names, first):
        name = name.replace(".", "_")
        while name in taken:
            name = f"{name}~{row}"
        taken.add(name)
        yield name


def _token_file(dataset: TokenDataset, row: Row) -> TokenFile:
    info = dataset.info
    return TokenFile(
        bits=row.tokens,
        grid=row.grid,
        original_size=row.original_size,
        bits_per_token=info.bits_per_token,
        code_fingerprint=info.code_fingerprint,
        decoder_fingerprint=info.decoder_fingerprint,
        preparation=info.preparation if info.views.crops == "one" else None,
        source=f"{dataset.layout.address}: {row.key}",
    )


def _record(row: Row) -> dict[str, object]:
    return {
        "key": row.key,
        "view": row.view,
        "grid": row.grid,
        "original_size": row.original_size,
        "captions": row.captions,
        "label": row.label,
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
