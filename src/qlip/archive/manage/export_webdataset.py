"""Export a token dataset as tar shards for the webdataset library: .qlip, .txt and .json of each row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.layout import Layout, digest, part_name
from qlip.archive.manage.decode import TiledImage, file_names, tiled_images
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError
from qlip.runtime.progress import OnProgress, no_progress
from qlip.tokens import TokenFile
from qlip.tokens.image_codec import join_tiles

RECORD = "export.json"
AT_ONCE = 256
"""Rows in memory."""


def export(
    dataset: TokenDataset, folder: str, *, storage: Storage | None = None, on_progress: OnProgress = no_progress
) -> int:
    """Write the missing tars, one for each part. Equal datasets give equal bytes.

    A row, or an image of a dataset of tiles, has KEY.qlip, as `qlip encode` writes, KEY.json (key, view, grid, sizes,
    captions, label) and, if it has a caption or label, KEY.txt with the first caption or the label. The library cuts
    names at the first dot, so dots in keys become ``_``, and to a name that is taken ``~`` and the row's number are
    appended; the JSON has the key itself.

    Args:
        dataset: to export.
        folder: path or address.
        storage: writes the tars.
        on_progress: called with the rows of each part.

    Returns:
        Number of tars in the folder.

    Raises:
        QLIPError: the folder holds another export, or cannot be written; an image lacks some of its tiles.
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

    tiled = dataset.info.views.fit == "tiles"
    images = tiled_images(dataset, rows) if tiled else []
    numbers = np.array([one.rows.start for one in images] if tiled else rows, dtype=np.int64)
    names = _without_dots(file_names(dataset, numbers, joined=tiled), numbers.tolist())
    for row, file in _joined(dataset, images) if tiled else _single(dataset, rows):
        name = next(names)
        _add(tar, f"{name}.qlip", file.to_bytes())
        _add(tar, f"{name}.json", json.dumps(_record(row), ensure_ascii=False).encode())
        text = next(iter(row.captions), row.label)
        if text:
            _add(tar, f"{name}.txt", text.encode())


def _single(dataset: TokenDataset, rows: range) -> Iterator[tuple[Row, TokenFile]]:
    """Yield each row with its file."""
    for start in range(rows.start, rows.stop, AT_ONCE):
        for row in dataset.rows(range(start, min(start + AT_ONCE, rows.stop))):
            yield row, _token_file(dataset, row)


def _joined(dataset: TokenDataset, images: Sequence[TiledImage]) -> Iterator[tuple[Row, TokenFile]]:
    """Yield the first row of each image, with the whole image's grid, and the file of all its tiles.

    Raises:
        QLIPError: tiles of an image are missing, or their preparation is not known, which a file of tiles names.
    """
    info, where = dataset.info, dataset.layout.address
    if images and info.preparation is None:
        raise QLIPError(
            f"{where}: the preparation of its tiles differs or is not known; export the datasets one by one"
        )
    for one in images:
        if not one.complete:
            raise QLIPError(f"{where}: {one.key} has not all of its tiles; export the dataset that it was drawn from")
        row, tile_grid = dataset.row(one.rows.start), info.grid
        assert tile_grid is not None
        file = TokenFile.from_indices(
            join_tiles(dataset.batch(one.rows), one.tiles, tile_grid),
            dataset.group_size,
            grid=(one.tiles[0] * tile_grid[0], one.tiles[1] * tile_grid[1]),
            original_size=row.original_size,
            code_fingerprint=info.code_fingerprint,
            decoder_fingerprint=info.decoder_fingerprint,
            preparation=info.preparation,
            tiles=one.tiles,
        )
        yield replace(row, grid=file.grid), file


def _without_dots(names: Iterator[str], rows: Sequence[int]) -> Iterator[str]:
    """Make the names of rows differ without their dots: what has one name is one sample to the library."""
    taken = set[str]()
    for row, name in zip(rows, names, strict=True):
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
        **row.extra,
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
