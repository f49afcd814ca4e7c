"""What a recipe is made into: the images that a run shows itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.data.loader.stream import ImageFeed
from qlip.data.shards.streaming import StreamedFeed
from qlip.errors import QLIPError
from qlip.training.tasks.build import first_images
from tests.data.loader.killed import feed_of
from tests.data.samples import folder, shard


def a_feed(path: Path, streamed: bool, count: int = 12) -> ImageFeed | StreamedFeed:
    """A folder, and shards read from front to back if asked for."""
    if not (path / "folder").exists():
        folder(path / "folder", count)
        for number in range(2):
            shard(path / f"s-{number}.tar", range(20 * number, 20 * number + 20), broken=[0])
    sources: list[dict[str, object]] = [{"path": str(path / "folder")}]
    if streamed:
        sources += [{"path": str(path / f"s-{number}.tar"), "streaming": True, "num_cursors": 1} for number in range(2)]
    feed = feed_of(sources, 0)
    assert isinstance(feed, StreamedFeed if streamed else ImageFeed)
    return feed


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", ["cut", "gone", "words"])
def test_first_images__without_broken_ones(tmp_path: Path, fault: str, streamed: bool) -> None:
    feed = a_feed(tmp_path, streamed)
    first = 0 if isinstance(feed, StreamedFeed) else feed.stream.mixture[0].index
    image = tmp_path / "folder" / f"{first:03d}.jpg"
    if fault == "cut":
        image.write_bytes(image.read_bytes()[:200])
    elif fault == "gone":
        image.unlink()
    else:
        image.with_suffix(".json").write_text("{")
    assert first_images(feed, 6).shape == (6, 3, 4, 4)  # as many as asked for all the same


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_first_images__no_more_than_asked_for(tmp_path: Path, count: int) -> None:
    """Counts that the three sources do not divide, too."""
    assert len(first_images(a_feed(tmp_path, streamed=True), count)) == count


def test_first_images__none_where_none_is_readable(tmp_path: Path) -> None:
    feed = a_feed(tmp_path, streamed=False, count=4)
    for path in (tmp_path / "folder").glob("*.jpg"):
        path.write_bytes(b"")
    assert len(first_images(feed, 5)) == 0


def test_first_images__a_stream_without_readable_samples_is_an_error(tmp_path: Path) -> None:
    feed = a_feed(tmp_path, streamed=True, count=4)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(QLIPError, match="no sample of .* can be read"):
        first_images(feed, 5)
