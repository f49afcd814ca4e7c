"""Export a token dataset as one plain array of ids, for trainers that map a file of integers into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib import format as npy

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.labelled import LabelledTokens
from qlip.errors import QLIPError
from qlip.files import write_bytes, written_aside
from qlip.lm.sequences import SequenceLayout
from qlip.runtime.progress import OnProgress, no_progress

ArrayFormat = Literal["npy", "bin"]
AT_ONCE = 1024
"""Rows in memory."""


def export_arrays(
    dataset: TokenDataset,
    folder: Path,
    file_format: ArrayFormat = "npy",
    *,
    begin: bool = False,
    on_progress: OnProgress = no_progress,
) -> Path:
    """Write the ids of all rows, in the order of the dataset.

    ``tokens.npy`` is an array (R, S) of R rows: the N x K group values of an image, token by token in raster order;
    with `begin`, an id of its own comes before them. ``tokens.bin`` is the same numbers without a header. They are
    little-endian uint16, or uint32 where the vocabulary needs it. ``tokens.json`` has the shape, the type and the
    vocabulary. If the images have labels, ``labels.npy`` has their class ids, int32 (R,), -1 for none, and the JSON
    has the classes.

    Args:
        dataset: of one grid; its group size decides about the vocabulary of 2^group_size ids.
        folder: for the files, which are replaced.
        file_format: ``npy`` or ``bin``.
        begin: begin each image with the id after the group values.
        on_progress: called with the rows of each batch.

    Returns:
        The file of ids.

    Raises:
        QLIPError: the dataset has several grids or too many ids, or the folder cannot be written.
    """
    info, where = dataset.info, dataset.layout.address
    if info.grid is None:
        raise QLIPError(
            f"{where}: its rows have several grids, and an array has rows of one length; tokenise to one size"
        )
    layout = SequenceLayout.for_bits(info.bits_per_token, dataset.group_size, begin=begin)
    if layout.vocabulary_size > 1 << 32:
        raise QLIPError(f"{where}: groups of {dataset.group_size} bits have too many ids; take a smaller group size")
    dtype = np.dtype("<u2" if layout.vocabulary_size <= 1 << 16 else "<u4")
    shape = (len(dataset), layout.length(info.grid[0] * info.grid[1]))
    path = folder / f"tokens.{file_format}"
    with written_aside(path) as aside, open(aside, "wb") as file:
        if file_format == "npy":
            npy.write_array_header_1_0(
                file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            )
        for start in range(0, len(dataset), AT_ONCE):
            rows = range(start, min(start + AT_ONCE, len(dataset)))
            file.write(layout.to_sequence(dataset.batch(rows)).numpy().astype(dtype).tobytes())
            on_progress(len(rows))
    facts = {
        "dataset": where,
        "shape": shape,
        "dtype": dtype.name,
        "vocabulary_size": layout.vocabulary_size,
        "begin_id": layout.begin_id,
        "group_size": dataset.group_size,
        "groups": layout.groups,
        "grid": info.grid,
        "model": info.model,
        "code_fingerprint": info.code_fingerprint,
    }
    labelled = _labelled(dataset)
    if labelled is not None:
        ids = labelled.class_ids(range(len(dataset))).numpy().astype(np.int32)
        with written_aside(folder / "labels.npy") as aside, open(aside, "wb") as file:
            np.save(file, ids)
        facts["classes"] = labelled.classes
    write_bytes(folder / "tokens.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def _labelled(dataset: TokenDataset) -> LabelledTokens | None:
    try:
        return LabelledTokens(dataset)
    except QLIPError:
        return None  # made without labels, or none of its images has one
