"""Captions and labels of rows that may be mirror images: never one that names a side of a mirror image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.parquet_reader import Numbers, values_of
from qlip.data.sources.captions import names_side, without_sides

FAULT = "a mirror image whose captions or label name a side, in a dataset without the image itself"


class TrueTexts(NamedTuple):
    """Rows to train on, with texts that are true of them.

    Attributes:
        rows: int64 (B,); some are the unmirrored twins of the rows that were asked for.
        captions, labels: of each row.
        usable: bool (B,), False where nothing true is known of a row.
    """

    rows: Numbers
    captions: list[tuple[str, ...]]
    labels: list[str | None]
    usable: NDArray[np.bool_]


def true_texts(dataset: TokenDataset, rows: Numbers, by_label: bool = False) -> TrueTexts:
    """Read captions and labels, without those that are false of a mirror image.

    A mirror image keeps its captions that name no side (`qlip.data.sources.captions.names_side`). If all name one, its
    unmirrored twin, the row of the same crop before mirroring, takes its place.

    Args:
        dataset: with captions.
        rows: int64 (B,).
        by_label: labels are used where there are captions too.

    Raises:
        QLIPError: the dataset was made without captions.
    """
    captions, labels = dataset.captions_and_labels(rows)
    rows, usable = rows.copy(), np.ones(len(rows), dtype=bool)
    offsets = _offsets(dataset, rows)
    for place in np.flatnonzero(offsets).tolist():
        given, label = captions[place], labels[place]
        true = without_sides(given)
        false_label = label is not None and (by_label or not given) and names_side(label)
        if not false_label and (true or not given):
            captions[place] = true
            continue
        row, twin = rows[place], rows[place] - offsets[place]
        usable[place] = twin >= 0 and _are_twins(dataset, int(twin), int(row), int(offsets[place]))
        rows[place] = twin if usable[place] else row
    return TrueTexts(rows, captions, labels, usable)


def _offsets(dataset: TokenDataset, rows: Numbers) -> Numbers:
    """Return the distance from each mirror image to its twin, in rows; 0 for all other rows."""
    found = np.zeros(len(rows), np.int64)
    for places, part, _, _ in dataset.groups.scattered(rows):
        if (first := dataset.groups.views(part).first_mirrored) is not None:
            views = values_of(dataset.groups.take(rows[places], "view"))
            found[places] = np.where(views >= first, first, 0)
    return found


def _are_twins(dataset: TokenDataset, twin: int, row: int, offset: int) -> bool:
    pair = np.array([twin, row])
    keys, views = dataset.keys(pair), dataset.groups.take(pair, "view").to_pylist()
    return keys[0] == keys[1] and bool(views[0] + offset == views[1])
