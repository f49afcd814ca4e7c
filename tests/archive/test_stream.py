"""TokenStream and TokenFeed: each row once per epoch over ranks and workers; exact resumption."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.dataset.stream import Shuffle, TokenBatch, TokenFeed, TokenStream
from qlip.archive.manage.merge import sample
from qlip.data.loader.feed import State
from tests.archive.made import made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    root = tmp_path_factory.mktemp("stream")
    return TokenDataset(made(root / "tokens", parts=5, rows=4).address)


def rows_of(batches: list[TokenBatch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


@pytest.mark.parametrize("shuffle", ["blocks", "full", "none"])
def test_token_stream__each_row_once_per_epoch_in_an_order_of_its_own(dataset: TokenDataset, shuffle: Shuffle) -> None:
    stream = TokenStream(dataset, 3, shuffle=shuffle, window=2, epochs=3)
    rows, size = rows_of(list(stream)), len(dataset)
    epochs = [rows[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len(rows) == 3 * size
    if shuffle == "none":
        assert epochs[0] == epochs[1] == list(range(size))
    else:
        assert len({tuple(epoch) for epoch in [*epochs, list(range(size))]}) == 4
    other = TokenStream(dataset, 3, shuffle=shuffle, window=2, seed=1, epochs=1)
    assert (rows_of(list(other)) == epochs[0]) == (shuffle == "none")


def test_token_stream__batch_holds_its_rows(dataset: TokenDataset) -> None:
    batch = next(iter(TokenStream(dataset, 6, captions=True, embeddings=True)))
    rows = batch.rows.tolist()
    assert isinstance(batch.indices, torch.Tensor) and torch.equal(batch.indices, dataset.batch(rows))
    assert batch.keys == dataset.keys(rows) and (batch.captions, batch.labels) == dataset.captions_and_labels(rows)
    assert batch.embeddings is not None and batch.embeddings.numpy().tolist() == dataset.embeddings(rows).tolist()


def test_token_stream__blocks_keep_neighbours_together(tmp_path: Path) -> None:
    """Rows of a window come from as few parts as the window has blocks."""
    dataset = TokenDataset(made(tmp_path / "t", parts=12, rows=4, embedding_dim=None).address)
    rows = rows_of(list(TokenStream(dataset, 8, window=2, epochs=1)))
    assert all(len({row // 4 for row in rows[start : start + 8]}) == 2 for start in range(0, 48, 8))
    assert any(rows[start : start + 4] != sorted(rows[start : start + 4]) for start in range(0, 48, 8))


def test_token_stream__ranks_and_workers_share_each_row_and_resume_anywhere(dataset: TokenDataset) -> None:
    size, batch = len(dataset), 6
    alone = list(itertools.islice(iter(TokenStream(dataset, batch, epochs=2)), 100))
    assert sorted(rows_of(alone)) == sorted(list(range(size)) * 2)

    def ranks(workers: int, state: dict[str, object] | None, take: int | None = None) -> list[list[int]]:
        shares = []
        for rank in range(2):
            stream = TokenStream(dataset, batch, rank=rank, world=2, num_workers=workers, epochs=2)
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            shares.append([one.rows.tolist() for one in itertools.islice(iter(stream), take)])
        return [first + second for first, second in zip(*shares, strict=True)]

    whole = [one.rows.tolist() for one in alone]
    assert ranks(2, None) == whole
    for stop in range(len(whole) + 1):
        stream = TokenStream(dataset, batch, epochs=2)
        first = list(itertools.islice(iter(stream), stop))
        rest = ranks(2 if stop == 3 else 0, stream.state_dict())
        assert [one.rows.tolist() for one in first] + rest == whole
    half = TokenStream(dataset, batch, epochs=2)
    for _ in itertools.islice(iter(half), 2):
        pass
    other = TokenStream(dataset, 5, epochs=2)
    other.load_state_dict(half.state_dict())
    assert rows_of(alone[:2]) + rows_of(list(other)) == rows_of(alone)


def test_token_stream__loop_continues_where_the_last_one_stopped(dataset: TokenDataset) -> None:
    whole = rows_of(list(itertools.islice(iter(TokenStream(dataset, 4)), 6)))
    stream = TokenStream(dataset, 4)
    parts = [rows_of(list(itertools.islice(iter(stream), count))) for count in (2, 1, 3)]
    assert sum(parts, []) == whole
    assert (stream.position, stream.epoch) == (24, 1)


def test_token_stream__different_grids_come_as_a_list(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "m", grid=[(2, 2), (1, 3)], embedding_dim=None).address)
    batch = next(iter(TokenStream(dataset, 5)))
    assert isinstance(batch.indices, list)
    assert all(torch.equal(one, dataset[row]) for one, row in zip(batch.indices, batch.rows.tolist(), strict=True))


def test_token_stream__refuses_the_state_of_another_stream(dataset: TokenDataset, tmp_path: Path) -> None:
    state = TokenStream(dataset, 4).state_dict()
    with pytest.raises(QLIPError, match="seed 0, this feed 1"):
        TokenStream(dataset, 4, seed=1).load_state_dict(state)
    other = TokenDataset(made(tmp_path / "other", seed=9).address)
    with pytest.raises(QLIPError, match="of another dataset"):
        TokenStream(other, 4).load_state_dict(state)
    with pytest.raises(QLIPError, match="batch_size 1 for 2 ranks"):
        TokenStream(dataset, 1, rank=0, world=2)
    bare = TokenDataset(made(tmp_path / "bare", embedding_dim=None, captions=False).address)
    with pytest.raises(QLIPError, match="holds no captions"):
        TokenStream(bare, 1, captions=True)


def test_token_feed__is_the_stream_with_a_state_beside_each_batch(dataset: TokenDataset) -> None:
    stream, feed = TokenStream(dataset, 6, epochs=2), TokenFeed(dataset, 6, epochs=2)
    for one, (batch, state) in zip(stream, feed.open(None), strict=True):
        assert one.rows.tolist() == batch.rows.tolist() and state == stream.state_dict()
        assert list(state) == ["position", "seed", "shuffle", "window", "dataset"]
    whole = [batch.rows.tolist() for batch, _ in feed.open(None)]
    saved: list[State] = [next(itertools.islice(feed.open(None, rank=rank, world=2), 2, 3))[1] for rank in range(2)]
    state = feed.merge(json.loads(json.dumps(saved)))
    shares = [[batch.rows.tolist() for batch, _ in feed.open(state, rank=rank, world=2)] for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole[3:]
    resumed = TokenStream(dataset, 6, epochs=2)
    resumed.load_state_dict(state)
    assert [batch.rows.tolist() for batch in resumed] == whole[3:]
    with pytest.raises(QLIPError, match="window 16, this feed 2"):
        next(TokenFeed(dataset, 6, window=2).open(state))


def test_token_batch__splits_into_micro_batches(dataset: TokenDataset, tmp_path: Path) -> None:
    batch, _ = next(TokenFeed(dataset, 7, captions=True).open(None))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 3] and batch.skipped == [] and batch.embeddings is None
    assert isinstance(batch.indices, torch.Tensor) and batch.captions is not None and batch.labels is not None
    assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)  # type: ignore[misc]
    assert [text for part in parts for text in part.captions or []] == batch.captions
    assert [label for part in parts for label in part.labels or []] == batch.labels
    assert [key for part in parts for key in part.keys] == batch.keys
    mixed = TokenDataset(made(tmp_path / "m", grid=[(2, 2), (1, 3)], embedding_dim=None).address)
    batch, _ = next(TokenFeed(mixed, 5).open(None))
    assert [len(part.indices) for part in batch.split(2)] == [2, 3]
    moved = batch.to(torch.device("meta")).indices
    assert isinstance(moved, list) and all(one.is_meta for one in moved)


def test_token_feed__one_view_of_each_image_per_epoch(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", parts=2, rows=30, views=Views(crops="ten")).address)
    stream = TokenStream(dataset, 4, one_view=True, epochs=6, window=1)
    rows = rows_of(list(stream))
    epochs = [rows[start : start + 6] for start in range(0, 36, 6)]
    assert all(sorted(row // 10 for row in epoch) == list(range(6)) for epoch in epochs) and stream.epoch == 6
    assert len({row % 10 for row in rows}) > 5  # 36 draws of ten views
    assert rows_of(list(TokenStream(dataset, 5, one_view=True, epochs=6, window=1))) == rows
    half = TokenStream(dataset, 4, one_view=True, epochs=6, window=1)
    first = rows_of(list(itertools.islice(iter(half), 4)))
    again = TokenStream(dataset, 4, one_view=True, epochs=6, window=1, num_workers=2)
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert first + rows_of(list(again)) == rows
    with pytest.raises(QLIPError, match="one_view"):
        TokenStream(dataset, 4, window=1).load_state_dict(half.state_dict())


def test_token_feed__one_view_needs_views_that_lie_together(tmp_path: Path) -> None:
    layout = made(tmp_path / "t", parts=1, rows=20, views=Views(crops="ten"))
    few = Layout(str(tmp_path / "few"))
    sample(TokenDataset(layout.address), few, 10, seed=1)
    with pytest.raises(QLIPError, match="do not lie together"):
        list(TokenStream(TokenDataset(few.address), 1, one_view=True, epochs=5))
    sample(TokenDataset(layout.address), Layout(str(tmp_path / "odd")), 7)
    with pytest.raises(QLIPError, match="different numbers of views"):
        TokenStream(TokenDataset(tmp_path / "odd"), 1, one_view=True)


def test_token_feed__class_ids(dataset: TokenDataset) -> None:
    batch = next(iter(TokenStream(dataset, 9, class_ids=True, captions=True)))
    assert batch.class_ids is not None and batch.labels is not None
    assert batch.class_ids.tolist() == [{"cat": 0, "dog": 1, None: -1}[label] for label in batch.labels]


def test_token_stream__damaged_part_is_an_error_in_one_line(tmp_path: Path) -> None:
    layout = made(tmp_path / "tokens", parts=2)
    Path(layout.part_path(1)).write_bytes(b"PAR1")
    with pytest.raises(QLIPError, match=r"part-00001.parquet: damaged"):
        list(TokenStream(TokenDataset(layout.address), 2, num_workers=1, epochs=1))
