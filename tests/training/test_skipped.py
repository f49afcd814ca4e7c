"""Images that cannot be read: counted once, and compared with a number or a share."""

from __future__ import annotations

import pytest

from qlip import QLIPError
from qlip.training import skipped
from qlip.training.skipped import TOLERATED, SkippedSamples


def broken(number: int) -> list[tuple[str, str, str]]:
    return [(f"{one}.jpg", "photos", "truncated") for one in range(number)]


def test_add__names_an_image_once() -> None:
    found = SkippedSamples(10)
    assert found.add(broken(2)) == [
        "skipped image 1: 0.jpg of photos: truncated",
        "skipped image 2: 1.jpg of photos: truncated",
    ]
    assert found.add(broken(3)) == ["skipped image 3: 2.jpg of photos: truncated"]
    assert (found.images, found.events) == (3, 5)
    again = SkippedSamples(10)
    again.load(found.state(), found.events)
    assert again.add(broken(3)) == [] and (again.images, again.events) == (3, 8)


@pytest.mark.parametrize(
    ("limit", "images", "samples", "refused"),
    [
        (2, 2, 10, False),
        (2, 3, 10**9, True),
        (0, 1, 100, True),
        (0.01, TOLERATED, 0, False),
        (0.01, TOLERATED + 1, 1000, True),
        (0.01, 200, 20_000, False),
        (0.01, 203, 20_000, True),
    ],
)
def test_check__number_of_images_or_share_of_what_was_read(
    limit: float, images: int, samples: int, refused: bool
) -> None:
    found = SkippedSamples(limit)
    found.add(broken(images))
    if refused:
        with pytest.raises(QLIPError, match=rf"{images} images? cannot be read, the limit is {limit:g}.*skip_limit"):
            found.check(samples)
    else:
        found.check(samples)


def test_summary__says_how_many_and_which(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SkippedSamples(10)
    assert found.summary() == []
    monkeypatch.setattr(skipped, "MAX_NAMED", 12)
    found.add(broken(14))
    first, *names, last = found.summary()
    assert first == "skipped 14 samples of 14 images that could not be used:"
    assert names[0] == "  0.jpg of photos: truncated" and len(names) == 10 and "and 2 more" in last
