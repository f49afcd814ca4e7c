"""Evaluation sets: each sample once, in the source's order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from qlip.data import EvalSet, EvalTransform, FolderImages
from qlip.data.loader.eval_set import draw_positions
from qlip.data.sources.labelled import ClassFolders
from qlip.errors import QLIPWarning
from qlip.modeling.processor import Preprocessing
from tests.data.samples import encoded, tars


def test_eval_set__each_sample_once_and_in_order(tmp_path: Path) -> None:
    source = tars(tmp_path, 23, broken=(5,))
    for num_workers in (0, 2):
        evaluation = EvalSet(source, EvalTransform(Preprocessing((16, 16), 16)))
        found = list(evaluation.batches(8, num_workers))
        assert [len(batch) for batch in found] == [7, 8, 7]
        assert [key for batch in found for key in batch.keys] == [f"{n:04d}" for n in range(23) if n != 5]
        assert [one.key for batch in found for one in batch.skipped] == ["0005"]
        assert found[0].captions[0] == ("first 0", "second 0") and found[0].labels[1] == "odd 1"
        assert found[0].pixel_values.shape == (7, 3, 16, 16)
    assert [len(batch) for batch in EvalSet(source, evaluation.transform, limit=4, drawn=False).batches(3)] == [3, 1]


def test_eval_set__text_faults_are_counted_and_drop_no_image(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(number))
        (tmp_path / f"{number:02d}.json").write_text('{"caption": {}}' if number else '{"caption": "half \\ud83d"}')
    evaluation = EvalSet(FolderImages(tmp_path), EvalTransform(Preprocessing((16, 16), 16)))
    with pytest.warns(QLIPWarning) as caught:
        found = list(evaluation.batches(1))
    assert [len(batch) for batch in found] == [1] * 12 and found[0].captions == [("half \ufffd",)]
    said = [str(one.message) for one in caught]
    assert [line.split(",")[0].rpartition("repaired ")[2] for line in said] == ["1 time", "10 times", "12 times"]
    assert all("00.json: field 'caption' holds half a surrogate pair" in line for line in said)


def class_folders(tmp_path: Path, counts: dict[str, int]) -> ClassFolders:
    """Folders of empty files: labels are known from the paths."""
    for label, count in counts.items():
        (tmp_path / label).mkdir()
        for number in range(count):
            (tmp_path / label / f"{number:03d}.png").touch()
    return ClassFolders(tmp_path)


@pytest.mark.parametrize("count", [6, 17, 60])
def test_draw_positions__each_class_gives_its_share(tmp_path: Path, count: int) -> None:
    """The first 17 of these images are of one class."""
    shares = {"ant": 40, "bee": 20, "cat": 20, "dog": 20, "eel": 10, "fox": 10}
    source = class_folders(tmp_path, shares)
    positions = draw_positions(source, count)
    assert len(set(positions)) == count and positions == sorted(positions) == draw_positions(source, count)
    assert positions != draw_positions(source, count, seed=1)
    drawn = Counter(source.label(position) for position in positions)
    for label, size in shares.items():
        exact = size * count / 120
        assert int(exact) <= drawn[label] <= int(exact) + 1


def test_draw_positions__without_labels_all_parts_of_the_set_are_drawn_from(tmp_path: Path) -> None:
    source = FolderImages(class_folders(tmp_path, {"ant": 30, "bee": 30, "cat": 30}).path)
    positions = draw_positions(source, 9)
    assert [position // 10 for position in positions] == list(range(9))
    assert len({position % 10 for position in positions}) > 2


def test_eval_set__labels_are_known_without_reading_images(tmp_path: Path) -> None:
    source = tars(tmp_path, 6)
    assert [source.label(index) for index in range(6)] == [source.read(index).label for index in range(6)]


def test_eval_set__a_limit_draws_or_takes_the_first_as_before(tmp_path: Path) -> None:
    source = tars(tmp_path, 20)
    transform = EvalTransform(Preprocessing((16, 16), 16))
    drawn = EvalSet(source, transform, 5)
    assert [key for batch in drawn.batches(2) for key in batch.keys] == [source.key(at) for at in drawn.positions]
    assert list(drawn.positions) != list(range(5)) and drawn.stamp(range(5)) != ""
    assert list(EvalSet(source, transform, 5, drawn=False).positions) == list(range(5))
    assert list(EvalSet(source, transform, 50).positions) == list(range(20))
