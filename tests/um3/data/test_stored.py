"""Stored documents: written once, cut into rows that lose nothing, images never cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlip import QLIPError
from qlip.errors import QLIPWarning
from qlip.um3.batch import Row
from qlip.um3.data.stored import IMAGE, StoredRows, store
from qlip.um3.data.texts import Broken
from qlip.um3.sequence import Grammar, whole_image
from tests.um3.data.made import builder

Document = tuple[list[int], list[str]]


def image(name: str) -> Tensor:
    """Indices of an image, which differ by its name."""
    return torch.full((4, 4), int(name))


def read(names: Sequence[str]) -> list[Tensor | str]:
    return [image(name) if int(name) < 100 else f"{name}: broken" for name in names]


def rows_of(documents: list[Document], length: int) -> tuple[StoredRows, list[Row], list[str]]:
    """Rows, and reasons of what is skipped."""
    half = len(documents) // 2  # in two files
    stored = store("made up", [((some,), partial(list, some)) for some in (documents[:half], documents[half:])])
    kind = "interleaved" if stored.images else "text"
    source = StoredRows(kind, "made up", stored, builder(), length, read)
    numbers = np.arange(source.size)
    rows, skipped = source.rows(np.zeros_like(numbers), numbers)
    return source, rows, [one.reason for one in skipped]


def expanded(document: Document) -> list[int]:
    names = iter(document[1])
    parts = [
        whole_image(builder().config, image(next(names))).tolist() if one <= IMAGE else [one] for one in document[0]
    ]
    return [one for part in parts for one in part]


TEXT = st.lists(st.integers(4, 200), min_size=1, max_size=40).map(lambda ids: (ids, list[str]()))


@st.composite
def interleaved(draw: st.DrawFn) -> Document:
    ids, names = list[int](), list[str]()
    for part in draw(st.lists(st.one_of(st.integers(0, 99).map(str), st.lists(st.integers(4, 200))), max_size=6)):
        if isinstance(part, str):
            ids.append(IMAGE - len(names))
            names.append(part)
        else:
            ids += part
    return [*ids, 1], names


@settings(max_examples=40, deadline=None)  # each writes files
@given(documents=st.lists(TEXT, min_size=1, max_size=8), length=st.integers(4, 50))
def test_stored_rows__of_text_are_full_and_lose_nothing(documents: list[Document], length: int) -> None:
    _, rows, _ = rows_of(documents, length)
    lengths = [sum(map(len, row.documents)) for row in rows]
    assert set(lengths[:-1]) <= {length} and 0 < lengths[-1] <= length
    found = [id_ for row in rows for piece in row.documents for id_ in piece.tolist()]
    assert found == [id_ for ids, _ in documents for id_ in ids]
    # a piece is as much of one document as its row holds
    borders = np.cumsum([len(piece) for row in rows for piece in row.documents]).tolist()
    ends = np.cumsum([len(ids) for ids, _ in documents]).tolist()
    assert set(borders) == {*ends, *np.cumsum(lengths).tolist()}


@settings(max_examples=40, deadline=None)  # each writes files
@given(documents=st.lists(interleaved(), min_size=1, max_size=5), length=st.integers(18, 60))
def test_stored_rows__of_images_cut_none_and_lose_nothing(documents: list[Document], length: int) -> None:
    source, rows, skipped = rows_of(documents, length)
    grammar = Grammar(source.builder.config)
    pieces = [piece for row in rows for piece in row.documents]
    for piece in pieces:
        grammar.check(piece)
    assert torch.cat(pieces).tolist() == [id_ for one in documents for id_ in expanded(one)]
    lengths = [sum(map(len, row.documents)) for row in rows]
    assert max(lengths) <= length and not skipped and not sum(row.dropped for row in rows)
    # a row ends where the next number does not fit
    firsts = [18 if int(row.documents[0][0]) == 2 else 1 for row in rows[1:]]
    assert all(full + first > length for full, first in zip(lengths[:-1], firsts, strict=True))


def test_stored_rows__an_image_that_cannot_be_read_leaves_its_document_out() -> None:
    documents = [([9, IMAGE, 8, 1], ["100"]), ([7, IMAGE, 1], ["3"])]
    _, [row], skipped = rows_of(documents, 60)
    assert skipped == ["100: broken"] and row.dropped == 3 + 18
    assert [piece.tolist() for piece in row.documents] == [expanded(documents[1])]


def test_store__is_written_once_and_names_what_is_left_out() -> None:
    broken = [Broken("x", "line 2: not JSON"), Broken("y", "line 5: not JSON")]
    calls = []

    def documents() -> list[Document | Broken]:
        calls.append(1)
        return [([4, 5], []), broken[0], ([6], []), broken[1]]

    for _ in range(2):
        with pytest.warns(QLIPWarning, match="^a file: 2 of 4 documents left out; the first: line 2: not JSON$"):
            found = store("a file", [(("once",), documents)])
        assert found.read(0, 3).tolist() == [4, 5, 6] and found.ends.tolist() == [2, 3]
    assert len(calls) == 1
    other, moved = (store(name, [((name,), lambda: [([4, 5], []), ([7], [])])]) for name in ("other", "moved"))
    assert other.digest == moved.digest != found.digest


def test_store__another_process_that_writes_the_same_is_no_error(tmp_path: Path) -> None:
    def slow() -> list[Document | Broken]:
        store("a file", [(("race",), lambda: [([4, 5], [])])], tmp_path)
        return [([4, 5], [])]

    assert store("a file", [(("race",), slow)], tmp_path).read(0, 2).tolist() == [4, 5]
    assert len(list((tmp_path / "documents").iterdir())) == 1


def test_store__a_stopped_run_keeps_its_files_and_ranks_begin_with_different_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()

    def documents(number: int, stop: bool) -> Iterator[Document]:
        read.append(number)
        yield [number], []
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyboardInterrupt):
        store("files", [((one,), partial(documents, one, one == 0)) for one in range(4)], tmp_path)
    assert read == [1, 3, 0]
    found = store("files", [((one,), partial(documents, one, False)) for one in range(4)], tmp_path)
    assert read == [1, 3, 0, 0, 2] and found.read(0, 4).tolist() == [0, 1, 2, 3]


def test_store__without_a_document_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="^a file: holds no document; line 1: not JSON$"):
        store("a file", [((), lambda: [Broken("x", "line 1: not JSON")])], tmp_path)
