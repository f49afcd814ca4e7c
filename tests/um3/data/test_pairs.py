"""Rows of images with their texts: whole images, texts that are cut and counted, images that are left out and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip import QLIPError, QLIPModel
from qlip.archive.dataset.dataset import TokenDataset
from qlip.um3.batch import DocumentKind, Row
from qlip.um3.data.config import DataSection, ImageSource
from qlip.um3.data.pairs import PairRows, open_pairs
from qlip.um3.sequence import Grammar, indices_of
from tests.um3.data.made import builder, dataset, tokenizer

KIND: tuple[DocumentKind, DocumentKind] = ("image-to-text", "text-to-image")


def opened(source: dict[str, Any], kind: DocumentKind = "image-to-text", **section: Any) -> PairRows:
    values = {"length": 80, "images": [source]} | section
    return open_pairs(kind, ImageSource(**source), DataSection(**values), builder(), 0)


def read(source: PairRows, numbers: list[int]) -> tuple[list[Row], list[str]]:
    rows, skipped = source.rows(np.zeros(len(numbers), np.int64), np.array(numbers))
    return rows, [f"{one.key}: {one.reason}" for one in skipped]


def parts(source: PairRows, document: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Indices and text of a document."""
    config, ids = source.builder.config, document.tolist()
    begin = ids.index(config.begin_image)
    image = document[begin + 1 : begin + 17]
    text = [*ids[:begin], *ids[begin + 18 :]]
    return indices_of(config, image), tokenizer().decode(text)


@pytest.mark.parametrize("kind", KIND)
def test_pair_rows__each_image_once_per_epoch_with_its_caption(kind: DocumentKind, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "tokens")
    source = opened({"tokens": folder}, kind, text_dropout=0.0, text_room=20)
    assert source.documents == 80 // (19 + 20)
    rows, skipped = read(source, list(range(15)))  # two epochs of 15 images
    assert not skipped
    images = TokenDataset(folder, 7)
    captions = {tuple(images[row].flatten().tolist()): images.row(row).captions for row in range(15)}
    seen = []
    for document in (one for row in rows for one in row.documents):
        Grammar(source.builder.config).check(document)
        indices, text = parts(source, document)
        seen.append(tuple(indices.flatten().tolist()))
        assert text in captions[seen[-1]]
        assert (document[0] == source.builder.config.begin_image) == (kind == "image-to-text")
    assert sorted(seen[:15]) == sorted(seen[15:]) == sorted(captions)


def test_pair_rows__long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    long = "A dog ran; the cat did not. " * 5
    folder = dataset(tmp_path / "tokens", texts=[["Yes."], [long]])
    source = opened({"tokens": folder}, length=64, text_room=2)
    rows, _ = read(source, list(range(5)))
    assert source.documents == 3
    cut = 0
    for row in rows:
        texts = [parts(source, one)[1] for one in row.documents]
        for text in texts:
            assert text == "Yes." or (long.startswith(text) and len(text) < len(long))
        lengths = sum(len(tokenizer().encode("Yes." if text == "Yes." else long)) for text in texts)
        assert sum(map(len, row.documents)) + row.dropped == lengths + 3 * source.builder.cost
        assert row.dropped == max(0, lengths + 3 * source.builder.cost - 64)
        cut += row.dropped
    assert cut > 0


def test_pair_rows__room_is_measured_so_that_few_texts_are_cut(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "tokens", texts=[["Yes."], ["Rain fell on the hill all day."]])
    source = opened({"tokens": folder}, length=400)
    room = len(tokenizer().encode("Rain fell on the hill all day."))
    assert source.documents == 400 // (19 + room)
    assert not sum(row.dropped for row in read(source, [0, 1, 2])[0])


def test_pair_rows__dropout_leaves_texts_out(tmp_path: Path) -> None:
    source = opened({"tokens": dataset(tmp_path / "tokens")}, "text-to-image", text_dropout=0.5, text_room=20)
    documents = [one for row in read(source, list(range(60)))[0] for one in row.documents]
    without = sum(parts(source, one)[1] == "" for one in documents)
    assert abs(without / len(documents) - 0.5) < 0.15
    both = opened({"tokens": dataset(tmp_path / "again")}, text_dropout=0.5, text_room=20)
    assert all(parts(both, one)[1] for row in read(both, [0, 1, 2])[0] for one in row.documents)


def test_pair_rows__images_that_are_cut_short_or_without_text_are_named(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path / "tokens", parts=1, rows=4, grid=[(2, 2), (1, 2)], texts=[["Yes."], ["Yes."], [" "], ["Yes."]]
    )
    source = opened({"tokens": folder}, text_room=2)
    rows, skipped = read(source, [0, 1])
    assert source.documents == 3 and sum(len(row.documents) for row in rows) + len(skipped) == 6
    assert set(skipped) == {
        "000-0001: has 2 tokens, not the 4 of a whole image",
        "000-0002: has no caption",
        "000-0003: has 2 tokens, not the 4 of a whole image",
    }
    cut, blank = 2 * 4 + len(tokenizer().encode("Yes.")), 4 * 4 + len(tokenizer().encode(" "))
    assert sum(row.dropped for row in rows) == sum(blank if "no caption" in one else cut for one in skipped)


def test_pair_rows__labels_make_captions_by_templates(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("It is {}.\n")
    folder = dataset(tmp_path / "tokens", texts=[["Yes."]])
    source = opened({"tokens": folder, "templates": str(tmp_path / "templates.txt")})
    assert source.stream.templates == ("It is {}.",)
    [row], _ = read(source, [0])
    assert {parts(source, one)[1] for one in row.documents} == {"Yes."}


def test_open_pairs__what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "tokens")
    with pytest.raises(QLIPError, match="length 19: a row cannot hold an image, which takes 19 positions"):
        opened({"tokens": folder}, length=19)
    other = dataset(tmp_path / "other", code_fingerprint="f" * 64)
    with pytest.raises(
        QLIPError, match="other: tokens of the QLIP ffffffffffff, but the model's are of bundled, ccccc"
    ):
        opened({"tokens": other})
    with pytest.raises(QLIPError, match="its images have 4 x 2 tokens, the model's 2 x 2"):
        opened({"tokens": dataset(tmp_path / "grid", grid=(4, 2))})
    with pytest.raises(QLIPError, match="its tokens have 14 bits, the model's 28"):
        opened({"tokens": dataset(tmp_path / "bits", bits=14)})
    with pytest.raises(QLIPError, match="scenes:captioned: tokens of the QLIP"):
        opened({"scenes": "captioned"})


@pytest.mark.parametrize("source", [{"scenes": "captioned"}, {"questions": "train"}])
def test_open_pairs__of_made_scenes_are_drawn_on_the_fly(source: dict[str, str]) -> None:
    model = QLIPModel.from_pretrained("bundled")
    make = builder(grid=(8, 8), vision_fingerprint=model.code_fingerprint)
    section = DataSection(length=900, images=[source], text_room=40)
    rows = open_pairs("image-to-text", ImageSource(**source), section, make, 0)
    assert rows.documents == 3
    found, _ = read(rows, [0, 7])
    batch = rows.stream.read(np.arange(21, 24))
    assert batch.captions is not None
    for document, indices, texts in zip(found[1].documents, batch.indices, batch.captions, strict=True):
        assert document[1:257].tolist() == (indices.flatten() + make.config.visual_begin).tolist()
        assert tokenizer().decode(document[258:].tolist()) == texts[0]
    assert rows.stream.texts[21:24] == [texts[0] for texts in batch.captions]
