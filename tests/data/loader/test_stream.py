"""The training stream: the same bytes with any workers and after any restart, broken samples counted."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from qlip.data import (
    Batch,
    SkippedSample,
    Source,
    TrainingStream,
    TrainTransform,
    batches,
    load_templates,
)
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.errors import QLIPError, QLIPWarning
from tests.data.samples import encoded, folder, tars, tokenize

TRANSFORM = TrainTransform((16, 16), (0.4, 1.0), flip=0.5)


def make_stream(path: Path, seed: int = 0, broken: tuple[int, ...] = ()) -> TrainingStream:
    sources = [
        Source(tars(path, 40, broken=broken), TRANSFORM, weight=3, templates=load_templates("cifar")),
        Source(folder(path / "folder"), TRANSFORM, weight=1),
    ]
    return TrainingStream(sources, seed, tokenize)


def digest(batch: Batch) -> str:
    """Of every byte of a batch."""
    sha = hashlib.sha256()
    for tensor in (batch.pixel_values, batch.input_ids, batch.has_caption, batch.match_ids):
        sha.update(str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.numpy().tobytes())
    sha.update(repr((batch.keys, batch.captions, batch.skipped)).encode())
    return sha.hexdigest()


def digests(stream: TrainingStream, count: int, **options: int) -> list[str]:
    iterator = batches(stream, 8, **options)
    found = [digest(batch) for batch in itertools.islice(iterator, count)]
    iterator.close()  # type: ignore[attr-defined]
    return found


def test_training_stream__batch_holds_what_it_says(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    batch = next(iter(batches(stream, 64)))
    assert batch.pixel_values.shape == (64, 3, 16, 16) and batch.pixel_values.dtype == torch.float32
    assert batch.input_ids.shape == (64, 12) and batch.input_ids.dtype == torch.int64
    assert batch.has_caption.dtype == torch.bool and batch.match_ids.dtype == torch.int64
    assert len(batch) == len(batch.keys) == len(batch.captions) == 64 and batch.skipped == []
    for row, key in enumerate(batch.keys):
        source, _, name = key.partition("/")
        caption, number = batch.captions[row], int(name.partition(".")[0])
        assert bool(batch.has_caption[row]) == (caption is not None) == (int(batch.match_ids[row]) != 0)
        assert torch.equal(batch.input_ids[row], tokenize([caption or ""])[0][0])
        if source == "folder":
            assert caption == (f"image {number}" if number % 3 == 0 else None)
        elif number % 2 == 0:
            assert caption in (f"first {number}", f"second {number}")
        else:
            assert caption in {text.format(f"odd {number % 10}") for text in load_templates("cifar")}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # three workers on two cores: on purpose
def test_training_stream__bytes_do_not_depend_on_workers_or_restarts(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, broken=(3, 4))
    expected = digests(stream, 30)
    assert len(set(expected)) == 30
    for num_workers in (1, 2, 3):
        assert digests(stream, 30, num_workers=num_workers) == expected
    for start in (1, 7, 12, 29):
        fresh = make_stream(tmp_path, broken=(3, 4))
        assert digests(fresh, 30 - start, start=8 * start, num_workers=start % 3) == expected[start:]


def test_batches__resume_with_another_batch_size(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    whole = next(iter(batches(stream, 24)))
    first, second = next(iter(batches(stream, 8))), next(iter(batches(stream, 16, start=8)))
    assert torch.equal(whole.pixel_values, torch.cat([first.pixel_values, second.pixel_values]))
    assert whole.captions == first.captions + second.captions


def test_training_stream__differs_by_seed(tmp_path: Path) -> None:
    assert digests(make_stream(tmp_path, seed=0), 2) != digests(make_stream(tmp_path, seed=1), 2)


def test_batches__leave_the_global_rng_state_alone(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    for num_workers in (0, 1):
        torch.manual_seed(5)
        digests(stream, 2, num_workers=num_workers)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(3))


def test_training_stream__augmentation_depends_on_the_sample_alone(tmp_path: Path) -> None:
    """Taking a source out, or weighing it otherwise, changes when a sample comes, not what is made of it."""
    both = make_stream(tmp_path)
    alone = TrainingStream(both.sources[:1], 0, tokenize)
    places = {(p.epoch, p.index): position for position in range(400) if (p := both.mixture[position]).source == 0}
    shared = 0
    for position in range(100):
        place = alone.mixture[position]
        if (place.epoch, place.index) in places:
            shared += 1
            one, other = alone[position], both[places[place.epoch, place.index]]
            assert one.key == other.key and torch.equal(one.pixels, other.pixels)  # type: ignore[union-attr]
            assert one.caption == other.caption  # type: ignore[union-attr]
    assert shared == 100


def test_training_stream__epochs_differ_in_augmentation_and_caption(tmp_path: Path) -> None:
    stream = TrainingStream(make_stream(tmp_path).sources[:1], 0, tokenize)
    pixels, captions = Counter[bytes](), Counter[str | None]()
    for position in range(40 * 12):
        sample = stream[position]
        if sample.key == "tars/0002":
            pixels[sample.pixels.numpy().tobytes()] += 1  # type: ignore[union-attr]
            captions[sample.caption] += 1  # type: ignore[union-attr]
    assert sum(captions.values()) == 12 and len(pixels) >= 11 and set(captions) == {"first 2", "second 2"}


def test_training_stream__weights_are_exact(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    keys = [key for batch in itertools.islice(batches(stream, 100), 10) for key in batch.keys]
    assert Counter(key.partition("/")[0] for key in keys) == {"tars": 750, "folder": 250}


def test_training_stream__skipped_samples_are_named(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, broken=(3, 20))
    (tmp_path / "folder" / "002.jpg").write_bytes(b"not a jpeg")
    (tmp_path / "folder" / "003.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "folder" / "005.jpg").unlink()
    broken: Counter[tuple[str, str]] = Counter()
    faults = set[str]()
    with pytest.warns(QLIPWarning, match=r"captions or labels left out or repaired 1 time, .*003\.txt"):
        found = list(itertools.islice(batches(stream, 10), 16))
    for batch in found:
        assert len(batch) + len(batch.skipped) == 10 == len(batch.pixel_values) + len(batch.skipped)
        assert not any(key in batch.keys for key in ("tars/0003", "tars/0020", "folder/002.jpg"))
        for one in batch.skipped:
            assert isinstance(one, SkippedSample) and one.reason and "\n" not in one.reason
            broken[one.source, one.key] += 1
        faults |= set(batch.text_faults)
    assert {("tars", "0003"), ("tars", "0020"), ("folder", "002.jpg")} < set(broken)
    assert {key for source, key in broken if source == "folder"} == {"002.jpg", "005.jpg"}
    assert len(faults) == 1 and "003.txt: not UTF-8 text" in faults.pop()


def test_training_stream__batch_may_be_empty(tmp_path: Path) -> None:
    source = Source(tars(tmp_path, 4, broken=range(4)), TRANSFORM)
    batch = next(iter(batches(TrainingStream([source], 0, tokenize), 4)))
    assert batch.pixel_values.shape == (0, 3, 16, 16) and batch.input_ids.shape == (0, 12)
    assert len(batch) == 0 and len(batch.skipped) == 4


def test_training_stream__captions_can_be_ignored(tmp_path: Path) -> None:
    stream = TrainingStream([Source(tars(tmp_path), TRANSFORM, captions=False)], 0, tokenize)
    batch = next(iter(batches(stream, 20)))
    assert not batch.has_caption.any() and not batch.match_ids.any() and not batch.input_ids.any()
    assert batch.captions == [None] * 20


def test_training_stream__equal_labels_and_equal_captions_match(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    meaning: dict[object, set[int]] = {}
    for batch in itertools.islice(batches(stream, 100), 2):
        for key, caption, match in zip(batch.keys, batch.captions, batch.match_ids.tolist(), strict=True):
            number = int(key.partition("/")[2].partition(".")[0])
            label = f"odd {number % 10}" if key.startswith("tars") and number % 2 else caption
            meaning.setdefault(label, set()).add(match)
    assert meaning.pop(None) == {0}
    assert all(len(ids) == 1 for ids in meaning.values())
    assert len(set().union(*meaning.values())) == len(meaning) > 15
    assert all(0 < match < 2**63 for ids in meaning.values() for match in ids)


def test_training_stream__refuses_sources_that_do_not_go_together(tmp_path: Path) -> None:
    one = Source(tars(tmp_path), TRANSFORM)
    other = Source(folder(tmp_path / "f"), TrainTransform((8, 8)))
    for sources, message in (
        ([], "no source"),
        ([one, one], "two sources are called 'tars'"),
        ([one, other], "size"),
    ):
        with pytest.raises(QLIPError, match=message):
            TrainingStream(sources, 0, tokenize)
    with pytest.raises(QLIPError, match="batch_size 0: give an integer, 1 or more"):
        next(iter(batches(TrainingStream([one], 0, tokenize), 0)))


class Sided(CaptionedImages):
    """One image; its captions are given."""

    name = "sided"

    def __init__(self, captions: tuple[str, ...], label: str | None = None) -> None:
        self.captions, self.word = captions, label

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        return RawSample(encoded(7), self.captions, self.word, str(index))


def flips(captions: tuple[str, ...], label: str | None = None) -> list[tuple[bool, str | None]]:
    """(flipped, caption) of 40 draws of an image; both ways to read a stream agree."""
    whole = TrainTransform((16, 16), (1.0, 1.0), (1.0, 1.0), flip=0.5)
    stream = TrainingStream([Source(Sided(captions, label), whole, templates=("a {}",))], 0, tokenize)
    batch = next(iter(batches(stream, 40)))
    again = stream.collate([stream[position] for position in range(40)])
    assert digest(again) == digest(batch)
    red = batch.pixel_values[:, 0, -1]  # (B, W), rising from left to right
    return list(zip((red[:, 0] > red[:, -1]).tolist(), batch.captions, strict=True))


def test_training_stream__a_flipped_image_has_no_caption_that_names_a_side() -> None:
    """Where none names a side, flips and captions are those of any two captions."""
    plain = flips(("first", "second"))
    assert {one for one, _ in plain} == {True, False}
    assert [(flipped, None) for flipped, _ in plain] == [(flipped, None) for flipped, _ in flips((), "cup")]
    some = flips(("a cup", "a cup on the left"))
    assert [flipped for flipped, _ in some] == [flipped for flipped, _ in plain]
    for (flipped, caption), (_, other) in zip(some, plain, strict=True):
        assert caption == ("a cup" if flipped or other == "first" else "a cup on the left")
    for sided in (flips(("a cup on the left", "right of it a plate")), flips((), "turn left")):
        assert not any(flipped for flipped, _ in sided)
    assert [caption for _, caption in flips(("to the left", "to the right"))] == [
        {"first": "to the left", "second": "to the right"}[caption or ""] for _, caption in plain
    ]
