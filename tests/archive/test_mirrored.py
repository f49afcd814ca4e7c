"""No mirror image comes with a caption or label that names a side."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.mirrored import FAULT
from qlip.archive.dataset.schema import Views
from qlip.archive.dataset.stream import TokenBatch, TokenStream
from qlip.archive.manage.merge import merge, sample
from qlip.data.sources.captions import names_side
from tests.archive.made import made

CAPTIONS = [["a cup"], ["a cup on the left"], ["a cup on the left", "a cup", "a cup, handle to the right"]]
"""Of which a mirror image may have all, none, or one."""


def images(folder: Path, crops: Literal["flip", "ten"] = "flip", parts: int = 1, prefix: str = "") -> Layout:
    rows = 6 * (2 if crops == "flip" else 10)
    return made(
        folder,
        parts=parts,
        rows=rows,
        views=Views(crops=crops),
        texts=CAPTIONS,
        embedding_dim=None,
        prefix=prefix,
    )


def epoch(dataset: TokenDataset, **options: bool) -> list[TokenBatch]:
    return list(TokenStream(dataset, 5, captions=True, epochs=1, **options))


@pytest.mark.parametrize(("crops", "first"), [("flip", 1), ("ten", 5)])
def test_token_stream__no_mirror_image_with_a_side(tmp_path: Path, crops: Literal["flip", "ten"], first: int) -> None:
    """The unmirrored twin takes the place of a mirror image that has only captions with sides."""
    dataset = TokenDataset(images(tmp_path / "t", crops).address)
    batches = epoch(dataset)
    seen: list[int] = []
    for batch in batches:
        rows = batch.rows.numpy()
        views = np.array(dataset.groups.take(rows, "view").to_pylist())
        assert batch.captions is not None and not batch.skipped
        assert (batch.indices == dataset.batch(rows)).all() and batch.keys == dataset.keys(rows)  # type: ignore[union-attr]
        for view, texts in zip(views, batch.captions, strict=True):
            assert texts and not (view >= first and any(map(names_side, texts)))
        seen += rows.tolist()
    size = 2 * first
    mirrored_sides = {row for row in range(len(dataset)) if row // size % 3 == 1 and row % size >= first}
    expected = [row - first if row in mirrored_sides else row for row in range(len(dataset))]
    assert sorted(seen) == sorted(expected)
    kept = {tuple(texts) for batch in batches for texts in batch.captions or ()}
    assert kept == {*map(tuple, CAPTIONS), ("a cup",)}  # unmirrored ones keep all


def test_token_stream__classes_that_name_a_side_are_never_mirrored(tmp_path: Path) -> None:
    dataset = TokenDataset(images(tmp_path / "t").address)
    for batch in TokenStream(dataset, 4, class_ids=True, epochs=1):
        for row, label in zip(batch.rows.tolist(), dataset.captions_and_labels(batch.rows.numpy())[1], strict=True):
            assert row % 2 == 0 or label == "a cup"


def test_token_stream__mirror_image_without_its_twin_is_skipped_and_named(tmp_path: Path) -> None:
    few = Layout(str(tmp_path / "few"))
    sample(TokenDataset(images(tmp_path / "t").address), few, 7, seed=3)
    dataset = TokenDataset(few.address)
    rows = dataset.rows(range(len(dataset)))
    there = {(row.key, row.view) for row in rows}
    alone = {row.key for row in rows if row.view and (row.key, 0) not in there and row.label == CAPTIONS[1][0]}
    batches = epoch(dataset)
    skipped = [one for batch in batches for one in batch.skipped]
    assert {one.key for one in skipped} == alone != set() and {one.reason for one in skipped} == {FAULT}
    assert sum(map(len, batches)) + len(skipped) == len(dataset)


def test_token_stream__merged_views_are_those_of_each_part(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain", parts=1, rows=3, texts=[CAPTIONS[1]], embedding_dim=None, prefix="p")
    merge(
        [plain, images(tmp_path / "flip"), images(tmp_path / "ten", "ten", prefix="t")], Layout(str(tmp_path / "all"))
    )
    dataset = TokenDataset(tmp_path / "all")
    assert dataset.info.views.crops == "one"
    mirrored = [
        row for row in range(len(dataset)) if 3 <= row < 15 and row % 2 == 0 or row >= 15 and (row - 15) % 10 > 4
    ]
    false = {
        row
        for batch in epoch(dataset)
        for row, texts in zip(batch.rows.tolist(), batch.captions or (), strict=True)
        if row in mirrored and any(map(names_side, texts))
    }
    assert not false and len(mirrored) == 36
