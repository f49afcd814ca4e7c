"""Shards read from front to back: the order a literal reading gives, states to go on from, faults in their places."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlip.data import TarImages
from qlip.data.config import DataConfig, SourceConfig
from qlip.data.image_feed import captions_of, describe_feed, open_feed
from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.sampler import Permutation
from qlip.data.shards.streaming import CursorSample, CursorState, ShardCursor, StreamedShards, choose_cursors
from qlip.data.sources.base import RawSample
from qlip.data.storage.retry import RETRIES, RetryPolicy, StorageError
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, validate
from qlip.modeling import Preprocessing
from tests.data.loader.killed import feed_of
from tests.data.objects import QUICK, ObjectServer, Request
from tests.data.samples import encoded, folder, shard, tokenize, write_tar

COUNTS = (5, 9, 7, 12, 6)


def shards(path: Path, counts: tuple[int, ...] = COUNTS) -> list[str]:
    """Shards of so many samples, numbered 100 * shard and on."""
    return [
        str(shard(path / f"s-{n}.tar", range(100 * n, 100 * n + count), broken=[100 * n + 3]))
        for n, count in enumerate(counts)
    ]


def shards_of(
    paths: list[str], num_cursors: int = 2, cursor_sets: int = 1, buffer: int = 8, **values: Any
) -> StreamedShards:
    storage = values.pop("storage", Storage(QUICK))
    return StreamedShards("source", tuple(paths), 4, num_cursors, cursor_sets, buffer, storage, **values)


def keys(cursor: ShardCursor, count: int) -> list[str]:
    return [drawn.raw.key for drawn in (cursor.next() for _ in range(count))]


def by_the_book(source: StreamedShards, cursor: int, count: int) -> list[str]:
    """What the module's head says, literally: all of the cursor's samples in a row, cut into buffers, each mixed."""
    row, begins = [], []
    for own in itertools.count():
        _, chosen = source.draw(cursor + own * source.total_cursors)
        tar = TarImages(source.shards[chosen])
        offsets = [tar._indexed.index(0).entry(n).image.offset - 512 for n in range(len(tar))]
        row += [tar.key(n) for n in range(len(tar))]
        begins += [(own, 0 if n == 0 else offset) for n, offset in enumerate(offsets)]
        if len(row) > count + source.cursor_buffer:
            break
    mixed = []
    for at in range(0, count, source.cursor_buffer):
        order = Permutation(source.cursor_buffer, source.seed, "buffer", "source", cursor, *begins[at])
        mixed += [row[at + order(n)] for n in range(source.cursor_buffer)]
    return mixed[:count]


def test_shard_cursor__equals_a_literal_reading(tmp_path: Path) -> None:
    source = shards_of(shards(tmp_path))
    for cursor in (0, 1):
        assert keys(ShardCursor(source, cursor), 60) == by_the_book(source, cursor, 60)


def test_streamed_shards__each_sample_once_per_pass(tmp_path: Path) -> None:
    source = shards_of(shards(tmp_path), num_cursors=2, cursor_sets=2)
    passes: dict[int, Counter[str]] = {}
    for number in range(4):
        cursor = ShardCursor(source, number)
        for _ in range(70):
            raw, (epoch, _, _) = cursor.next()
            passes.setdefault(epoch, Counter())[raw.key] += 1
    whole = {f"{100 * n + k:04d}" for n, count in enumerate(COUNTS) for k in range(count)}
    complete = [epoch for epoch, seen in passes.items() if set(seen) == whole]
    assert complete[:4] == [0, 1, 2, 3]
    assert all(max(seen.values()) == 1 for seen in passes.values())


def test_shard_cursor__passes_differ_in_order(tmp_path: Path) -> None:
    cursor = ShardCursor(shards_of(shards(tmp_path), num_cursors=1, buffer=13), 0)
    first, second = keys(cursor, 39), keys(cursor, 39)
    assert sorted(first) == sorted(second) and first != second
    unmixed = keys(ShardCursor(shards_of(shards(tmp_path), num_cursors=1, buffer=1), 0), 39)
    assert sorted(unmixed) == sorted(first) and unmixed != first


@pytest.mark.parametrize("store", [False, True])
def test_shard_cursor__continues_from_any_state(server: ObjectServer, store: bool) -> None:
    paths = shards(server.folder)
    if store:
        paths = [f"{server.address}/{Path(path).name}" for path in paths]
    source = shards_of(paths, buffer=10)
    cursor, drawn, states = ShardCursor(source, 1), [], []
    for _ in range(45):
        states.append(cursor.state)
        drawn.append(cursor.next())
    assert [state.samples for state in states] == list(range(45))
    for at in range(0, 45, 1 if not store else 7):
        again = ShardCursor(source, 1, CursorState(*json.loads(json.dumps(states[at]))))
        assert [again.next() for _ in range(min(8, 45 - at))] == drawn[at : at + 8]
        again.close()


def test_shard_cursor__skip_equals_reading(tmp_path: Path) -> None:
    source = shards_of(shards(tmp_path))
    read, skipped = ShardCursor(source, 0), ShardCursor(source, 0)
    for count in (1, 5, 0, 17, 8):
        for _ in range(count):
            read.next()
        skipped.skip(count)
        assert skipped.state == read.state and skipped.next() == read.next()


def test_shard_cursor__store_equals_disk(server: ObjectServer) -> None:
    paths = shards(server.folder)
    remote = shards_of([f"{server.address}/{Path(path).name}" for path in paths])
    near, far = ShardCursor(shards_of(paths), 0), ShardCursor(remote, 0)
    assert [near.next() for _ in range(50)] == [far.next() for _ in range(50)]
    assert 1 < len(server.gets()) == len(server.requests) / 2  # one a shard, after its size: each is one chunk


def test_shard_cursor__failing_store_gives_the_same_samples(server: ObjectServer) -> None:
    paths = shards(server.folder)
    faults = itertools.cycle(["500", None, "drop", "cut", None, "short", None])
    server.fault = lambda request: next(faults)
    near = ShardCursor(shards_of(paths), 0)
    far = ShardCursor(shards_of([f"{server.address}/{Path(path).name}" for path in paths]), 0)
    RETRIES.take()
    assert [near.next() for _ in range(50)] == [far.next() for _ in range(50)]
    assert RETRIES.take() >= 3


def test_shard_cursor__store_that_is_down_is_an_error(server: ObjectServer) -> None:
    paths = [f"{server.address}/{Path(path).name}" for path in shards(server.folder)]
    cursor = ShardCursor(shards_of(paths, storage=Storage(RetryPolicy(tries=2, longest_wait=0.01))), 0)
    cursor.next()
    server.fault = lambda request: "503"
    with pytest.raises(StorageError, match="gave up after 2 tries"):
        keys(cursor, 40)


def test_streamed_shards__with_replacement_draws_at_random(tmp_path: Path) -> None:
    source = shards_of(shards(tmp_path), replacement=True)
    drawn = [source.draw(number)[1] for number in range(1000)]
    assert all(150 < count < 250 for count in Counter(drawn).values())
    assert any(left == right for left, right in itertools.pairwise(drawn))
    cursor, other = ShardCursor(source, 0), ShardCursor(source, 0, CursorState(3, 0, 0, 30))
    identities = [cursor.next().identity for _ in range(200)]
    assert len(set(identities)) == 200  # a shard that comes again is augmented anew
    assert other.next() in [ShardCursor(source, 0, CursorState(3, 0, n, 30)).next() for n in range(4)]


# what is wrong with shards and samples


def broken_reasons(source: StreamedShards, count: int) -> list[str]:
    cursor = ShardCursor(source, 0)
    return [raw.reason for raw, _ in (cursor.next() for _ in range(count)) if isinstance(raw, SkippedSample)]


def test_shard_cursor__unreadable_shard_is_one_skipped_sample(tmp_path: Path) -> None:
    paths = shards(tmp_path, (4, 4, 4, 4, 4))
    whole = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(whole[: len(whole) // 3])
    Path(paths[2]).write_bytes(b"text, not a tar" * 100)
    write_tar(Path(paths[3]), [("a.txt", b"no image")])
    Path(paths[4]).unlink()
    source = shards_of(paths, num_cursors=1, buffer=3)
    reasons = broken_reasons(source, 60)
    for path, what in zip(paths[1:], ("truncated", "not an uncompressed", "no image", "No such file"), strict=True):
        assert any(reason.startswith(f"{path}: {what}") for reason in reasons)
    assert all("\n" not in reason for reason in reasons)
    cursor, states, drawn = ShardCursor(source, 0), [], []
    for _ in range(40):
        states.append(cursor.state)
        drawn.append(cursor.next())
    for at in range(0, 40, 3):  # the faults have their places in the row as samples do
        assert ShardCursor(source, 0, states[at]).next() == drawn[at]


def test_shard_cursor__damaged_samples_are_skipped(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", encoded(0)),
            ("a.json", b"{"),
            ("b.png", encoded(1)),
            ("b.png", encoded(2)),
            ("c.png", encoded(3)),
            ("c.txt", b"good"),
            ("d.seg.png", b"a mask"),
        ],
    )
    cursor = ShardCursor(shards_of([str(tmp_path / "x.tar")], num_cursors=1, buffer=1), 0)
    found: list[CursorSample] = [cursor.next() for _ in range(4)]
    assert isinstance(found[0].raw, RawSample) and found[0].raw.image == encoded(0)
    assert "a.json: not valid json" in str(found[0].raw.text_fault)
    assert isinstance(found[1].raw, SkippedSample) and "holds b.png twice" in found[1].raw.reason
    assert found[2].raw == RawSample(encoded(3), ("good",), None, "c")
    assert found[3].raw.key == "a" and found[3].identity[0] == 1
    with_field = ShardCursor(shards_of([str(tmp_path / "x.tar")], num_cursors=1, buffer=1, caption_field="alt"), 0)
    raw = [with_field.next().raw for _ in range(3)][2]
    assert isinstance(raw, RawSample) and "caption field 'alt' was asked for" in str(raw.text_fault)


def test_shard_cursor__a_class_file_is_the_label(tmp_path: Path) -> None:
    files = [("a.jpg", encoded(0)), ("a.cls", b"281\n"), ("IMG_1.5.jpg", encoded(1)), ("IMG_1.5.txt", b"text")]
    write_tar(tmp_path / "x.tar", files)
    cursor = ShardCursor(shards_of([str(tmp_path / "x.tar")], num_cursors=1, buffer=1), 0)
    found = [cursor.next().raw for _ in range(2)]
    assert found == [RawSample(encoded(0), (), "281", "a"), RawSample(encoded(1), ("text",), None, "IMG_1.5")]


def test_first__each_sample_once_without_extra_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that end with a key without an image: the next shard's first one is not the end of this one."""
    for number in range(3):
        files = [(f"{number}{n}.png", encoded(n)) for n in range(2)]
        write_tar(tmp_path / f"s-{number}.tar", [*files, (f"{number}9.txt", b"no image")])
    source = shards_of([str(tmp_path / f"s-{number}.tar") for number in range(3)], num_cursors=2)
    assert sorted(raw.key for raw in source.first(100)) == ["00", "01", "10", "11", "20", "21"]
    reads: list[str] = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda *asked: (reads.append(asked[1]), read(*asked))[1])
    for count in range(7):
        reads.clear()
        assert len(list(source.first(count))) == count == len(reads)


def test_digest__is_computed_once() -> None:
    source = shards_of([f"s-{number}.tar" for number in range(100)])
    assert source.digest is source.digest  # of every batch's state, so it is computed once


def test_shard_cursor__memory_is_bounded(server: ObjectServer) -> None:
    """80 MB of samples of 1 MB, a buffer of four: about six samples and two chunks are held, near and far."""
    noise = bytes(1 << 20)
    for number in range(2):
        files = [(f"{number}-{n:02d}.jpg", noise) for n in range(40)]
        write_tar(server.folder / f"big-{number}.tar", files)
    for prefix in (str(server.folder), server.address):
        cursor = ShardCursor(shards_of([f"{prefix}/big-0.tar", f"{prefix}/big-1.tar"], num_cursors=1, buffer=4), 0)
        tracemalloc.start()
        for _ in range(80):
            cursor.next()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 24 << 20, f"{prefix}: {peak / 2**20:.0f} MiB"


# as a recipe has it


def test_choose_cursors__fit_batch_and_shards() -> None:
    assert choose_cursors(None, None, 1000, 64, False, "x") == (8, 4)
    assert choose_cursors(None, None, 1000, 12, False, "x") == (6, 4)
    assert choose_cursors(None, None, 3, 12, False, "x") == (3, 1)
    assert choose_cursors(None, None, 1, 64, False, "x") == (1, 1)
    assert choose_cursors(None, 4, 9, 64, False, "x") == (2, 4)
    assert choose_cursors(16, None, 33, 64, False, "x") == (16, 2)
    assert choose_cursors(None, None, 1, 64, True, "x") == (8, 4)
    with pytest.raises(QLIPError, match="x: num_cursors 5 does not divide the batch size 64; 8 would"):
        choose_cursors(5, None, 100, 64, False, "x")
    with pytest.raises(
        QLIPError, match="num_cursors 8 x cursor_sets 4 is more than its 20 shards; lower them, or use more shards"
    ):
        choose_cursors(8, 4, 20, 64, False, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_cursors": 2}, "'num_cursors' goes with 'streaming: true'; remove it"),
        ({"replacement": True}, "'replacement' goes with 'streaming: true'"),
        ({"shuffle_buffer": 2}, "'shuffle_buffer' goes with 'streaming: true'"),
        ({"path": "folder", "streaming": True}, "'streaming' goes with the path of tars"),
        ({"streaming": True, "order": "blocks"}, "'order: blocks' goes with tars that are not streamed"),
        ({"streaming": True, "index": "x"}, "'index' goes with the path of tars that are not streamed"),
        ({"window": 2}, "'window' goes with 'order: blocks'"),
        ({"order": "blocks", "path": "folder"}, "'order: blocks' goes with tars"),
        ({"streaming": True, "num_cursors": 0}, "num_cursors: Input should be greater than or equal to 1, got 0"),
        ({"streming": True}, "unknown key 'streming' (did you mean 'streaming'?)"),
    ],
)
def test_source_config__refuses_settings_that_nothing_reads(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError) as caught:
        validate(SourceConfig, {"path": "x.tar"} | values, "recipe.yaml")
    assert message in str(caught.value)


def test_source_config__keys_of_version_0_1_mean_the_same() -> None:
    streamed = {"path": "x.tar", "streaming": True}
    old = validate(SourceConfig, streamed | {"lanes": 3, "turns": 2}, "r")
    assert old == validate(SourceConfig, streamed | {"num_cursors": 3, "cursor_sets": 2}, "r")
    assert "lanes" not in old.model_dump() and SourceConfig(**old.model_dump()) == old
    resolved = {"path": "x.tar", "lanes": None, "turns": None}  # as a resolved recipe of version 0.1 has them
    assert validate(SourceConfig, resolved, "r") == SourceConfig(path="x.tar")
    with pytest.raises(QLIPError, match="'lanes' is the old name of 'num_cursors'; remove it"):
        validate(SourceConfig, streamed | {"lanes": 3, "num_cursors": 3}, "r")


def test_streamed_feed__mixture_with_indexed_sources_keeps_its_shares(tmp_path: Path) -> None:
    shards(tmp_path)
    folder(tmp_path / "f", 7)
    streamed = {"path": f"{tmp_path}/s-*.tar", "streaming": True, "num_cursors": 3, "cursor_sets": 1, "weight": 3}
    sources = [streamed, {"path": str(tmp_path / "f"), "weight": 1}]
    feed = feed_of(sources, 0)
    found = [batch for batch, _ in itertools.islice(feed.open(None), 250)]
    assert all(len(batch) + len(batch.skipped) == 12 for batch in found)
    names = [key.rpartition("/")[0] for batch in found for key in batch.keys]
    broken = [one.source for batch in found for one in batch.skipped]
    assert Counter(names + broken) == {f"{tmp_path}/s-*.tar": 2250, str(tmp_path / "f"): 750}
    assert set(broken) == {f"{tmp_path}/s-*.tar"}
    assert describe_feed(feed, 2) == [
        f"{tmp_path}/s-*.tar: 75.0% of the stream, 5 streamed shards, 3 cursors x 1 sets",
        f"{tmp_path / 'f'}: 25.0% of the stream, 7 samples shuffled",
        "rank 0: places 0 to 5 of every batch of 12",
        "rank 1: places 6 to 11 of every batch of 12",
    ]
    words = list(captions_of(feed, 6))
    assert len(words) - 2 in (6, 8) and {"image 0", "image 3"} < set(words)


def test_streamed_feed__refuses_the_state_of_other_sources(tmp_path: Path) -> None:
    shards(tmp_path)
    path = f"{tmp_path}/s-*.tar"

    def opened(state: Any, **values: Any) -> Any:
        return next(
            feed_of([{"path": path, "streaming": True, "num_cursors": 2, "cursor_sets": 1} | values], 0).open(state)
        )[1]

    state = opened(None)
    assert opened(state)["position"] == 24
    with pytest.raises(
        QLIPError,
        match="num_cursors 3 and cursor_sets 1, but the state was saved with num_cursors: 2, cursor_sets: 1; set",
    ):
        opened(state, num_cursors=3)
    with pytest.raises(QLIPError, match="the saved state has no source "):
        opened({"position": 12})
    with pytest.raises(QLIPError, match="the saved state streams .*, the recipe does not"):
        next(feed_of([{"path": path}], 0).open(state))
    shard(tmp_path / "s-9.tar", range(3))
    with pytest.raises(QLIPError, match="other shards than in the saved state"):
        opened(state)


@pytest.mark.parametrize("fault", ["404", "403"])
def test_open_feed__wrong_address_is_an_error_at_once(server: ObjectServer, fault: str) -> None:
    server.fault = lambda request: fault
    config = {"sources": [{"path": f"{server.address}/x-{{0..3}}.tar", "streaming": True}], "store": {"tries": 2}}
    with pytest.raises(QLIPError, match="no such file" if fault == "404" else "no permission"):
        open_feed(validate(DataConfig, config, "r"), 0, Preprocessing((4, 4), None), tokenize, 8)


def test_streamed_feed__batch_counts_the_retries_of_its_worker(server: ObjectServer) -> None:
    shards(server.folder)
    faults = itertools.cycle(["500", None, None])

    def fault(request: Request) -> str | None:
        return next(faults) if request.method == "GET" else None

    server.fault = fault
    sources = [{"path": f"{server.address}/s-{{0..4}}.tar", "streaming": True, "num_cursors": 2, "cursor_sets": 1}]
    config = validate(DataConfig, {"sources": sources, "num_workers": 1, "store": {"longest_wait": 0.01}}, "r")
    feed = open_feed(config, 5, Preprocessing((4, 4), None), tokenize, 12)
    row = feed.open(None)
    found = [batch for batch, _ in itertools.islice(row, 12)]
    row.close()  # type: ignore[attr-defined]
    assert sum(batch.retries for batch in found) >= 4
    assert all(len(batch) + len(batch.skipped) == 12 for batch in found)


@pytest.mark.parametrize(
    ("names", "faults"),
    [
        ("x.png a.txt b.txt a.png b.png", "ab"),
        ("z.png z.txt a.png b.png a.txt c.png", "a"),  # said with the image before the text, as `a` is already out
        ("a.png b.png b.json a.cls", "a"),
        ("z.png z.txt a.png b.png c.png d.png e.png a.txt b.txt c.txt d.txt", "a, b, c and 1 more".split("|")),
        ("a.png a.txt b.png x.txt b.seg.png", ""),
    ],
)
def test_shard_cursor__texts_apart_from_their_images_are_named_and_counted(
    tmp_path: Path, names: str, faults: str | list[str]
) -> None:
    files = [(name, encoded(0) if name.endswith("png") else b"{}") for name in names.split()]
    write_tar(tmp_path / "x.tar", files)
    source = shards_of([str(tmp_path / "x.tar")], num_cursors=1, buffer=1)
    found = [str(raw.text_fault) for raw in source.first(9) if raw.text_fault is not None]
    assert len(found) == len(faults)
    for key, said in zip(faults, found, strict=True):
        assert f"x.tar: the files of {key} do not lie together" in said and "`qlip data index`" in said


@pytest.mark.parametrize(
    "names", ["a.txt b.txt a.png b.png", "a.cls b.json a.png b.png c.png c.txt", "a.png b.png a.txt b.txt"]
)
def test_shard_cursor__shard_sorted_by_type_is_refused_if_captions_count(tmp_path: Path, names: str) -> None:
    files = [(name, encoded(0) if name.endswith("png") else b"{}") for name in names.split()]
    write_tar(tmp_path / "x.tar", files)
    source = shards_of([str(tmp_path / "x.tar")], num_cursors=1, buffer=1)
    (refused,) = (one.raw for one in ShardCursor(source, 0).one_shard())
    assert isinstance(refused, SkippedSample) and "x.tar: the files of a do not lie together" in refused.reason
    with pytest.raises(QLIPError, match="no sample of source can be read: .*files of a do not lie together"):
        list(source.first(2))
    without = replace(source, captions=False)
    assert [raw.key for raw in without.first(2)] == ["a", "b"]
    began = ShardCursor(without, 0)
    began.next()
    assert ShardCursor(source, 0, began.state).next().raw == refused  # a run that used no captions continues with them
