"""Interleaved documents of JSON Lines: texts and images in order, and lines that are none."""

from __future__ import annotations

from pathlib import Path

from qlip.archive.dataset.dataset import TokenDataset
from qlip.um3.data.images import TokenImages
from qlip.um3.data.interleaved import read_interleaved, texts_of
from qlip.um3.data.stored import IMAGE
from qlip.um3.data.texts import Broken
from tests.um3.data.made import builder, config, dataset, jsonl, tokenizer


def test_read_interleaved__keeps_order_and_names_faults(tmp_path: Path) -> None:
    lines = [
        ["Two", " birds.", {"image": "a"}, "Then", {"image": "b"}, {"image": "a"}],
        "![",
        {"text": "no list"},
        ["x", {"image": "z"}],
        ["x", 3],
        ["x", {"image": "a", "more": 1}],
        [" "],
        [{"image": "b"}],
        ["half \ud800"],
        [{"image": "\ud800"}],
    ]
    path = jsonl(tmp_path / "a.jsonl", lines)
    found = list(read_interleaved(path, {"a", "b"}, builder()))
    own = tokenizer()
    ids = [*own.encode("Two birds."), IMAGE, *own.encode("Then"), IMAGE - 1, IMAGE - 2, own.eos]
    assert [one for one in found if not isinstance(one, Broken)] == [(ids, ["a", "b", "a"]), ([IMAGE, own.eos], ["b"])]
    assert [one.reason.removeprefix(f"{path}: ") for one in found if isinstance(one, Broken)] == [
        "line 2: not JSON",
        'line 3: not a list of texts and {"image": ...}',
        "line 4: there is no image 'z'",
        'line 5: 3 is neither a text nor {"image": ...}',
        """line 6: {'image': 'a', 'more': 1} is neither a text nor {"image": ...}""",
        "line 7: the document is empty",
        "line 9: a text has half a surrogate pair",
        "line 10: a text has half a surrogate pair",
    ]
    assert list(texts_of(path))[:3] == ["Two", " birds.", "Then"]


def test_token_images__an_image_cut_short_is_named(tmp_path: Path) -> None:
    dataset_ = TokenDataset(dataset(tmp_path / "tokens", parts=1, rows=2, grid=[(2, 2), (1, 2)]))
    images = TokenImages(dataset_, config())
    whole, cut = images(["000-0000", "000-0001"])
    assert not isinstance(whole, str) and whole.shape == (4, 4)
    assert cut == "000-0001: has 2 tokens, not the 4 of a whole image"
