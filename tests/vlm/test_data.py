"""Batches of conversations: packing, grouping by length, resumption, skipped samples, features."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError
from qlip.errors import QLIPWarning
from qlip.modeling.processor import QLIPProcessor
from qlip.vlm.batch import VLMBatch
from qlip.vlm.config import IGNORED, IMAGE_ID, VLMConfig
from qlip.vlm.conversations import IMAGE, Conversation, ConversationFile, Turn
from qlip.vlm.data import ConversationData, MakeBatch, open_feed, pack
from qlip.vlm.images import pixels_of
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.order import Grouped, Shuffled
from tests.lm.tokenizers import made
from tests.modeling.test_images import icc_profile
from tests.vlm.conftest import tiny

N, COUNT, LENGTH = 16, 20, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA JSON of 20 conversations and its images: every fifth is text alone, every seventh has two images."""
    folder, items = tmp_path_factory.mktemp("conversations"), []
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        images = [] if number % 5 == 0 else [f"{number}-{one}.png" for one in range(1 + (number % 7 == 0))]
        for name in images:
            Image.fromarray(rng.integers(0, 256, (40, 72, 3), dtype=np.uint8)).save(folder / name)
        question = {"from": "human", "value": f"{IMAGE * len(images)}\nWhat is it?"}
        turns = [question, {"from": "gpt", "value": "red " * (1 + number % 3)}]
        if number % 2:
            turns += [{"from": "human", "value": "and the square"}, {"from": "gpt", "value": "blue"}]
        items.append({"id": f"c{number}", "conversations": turns} | ({"image": images} if images else {}))
    items[3]["image"] = items[3]["image"][0]  # as LLaVA writes a single one
    (folder / "train.json").write_text(json.dumps(items))
    return folder


def opened(folder: Path, config: VLMConfig, **options: object) -> ConversationData:
    file = ConversationFile(folder / "train.json")
    preprocessing = QLIPProcessor.from_pretrained("bundled").preprocessing
    values = {"max_length": LENGTH} | options
    return ConversationData(file, folder, "train.json", config, made("llama3"), preprocessing, **values)  # type: ignore[arg-type]


@pytest.fixture
def data(folder: Path, vlm: VisionLanguageModel) -> ConversationData:
    return opened(folder, vlm.config)


def rows_of(batch: VLMBatch) -> list[tuple[int, ...]]:
    """Ids of the documents, without padding."""
    return [tuple(ids[ids_of == number].tolist()) for ids, ids_of in zip(batch.ids, batch.documents, strict=True)
            for number in range(int(ids_of.max()) + 1)]  # fmt: skip


def test_make_batch__has_the_conversations_of_its_positions(data: ConversationData) -> None:
    make = MakeBatch(data, Shuffled(COUNT, seed=3))
    positions = np.arange(5, 12)
    batch, indices = make(positions), Shuffled(COUNT, seed=3)(positions).tolist()
    examples = [data.example(index) for index in indices]
    assert rows_of(batch) == [tuple(one.ids.tolist()) for one in examples]
    images = [name for index in indices for name in data.conversations[index].images]
    assert batch.images_per_row.tolist() == [len(data.conversations[index].images) for index in indices]
    expected = [pixels_of(Image.open(data.folder / name), data.preprocessing) for name in images]
    assert torch.equal(batch.images, torch.stack(expected)) and not batch.skipped
    assert (batch.labels != IGNORED).sum() == sum((one.labels != IGNORED).sum() for one in examples)
    assert (batch.ids == IMAGE_ID).sum() == N * len(images)


def test_see__colour_profiles_are_read_as_the_model_reads_them(data: ConversationData, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (200, 80, 20))
    image.save(tmp_path / "swapped.png", icc_profile=icc_profile(swap=True))
    ignoring = replace(data, folder=tmp_path, preprocessing=replace(data.preprocessing, color_profiles="ignore"))
    assert torch.equal(ignoring.see("swapped.png"), pixels_of(image, data.preprocessing))
    assert not torch.equal(replace(data, folder=tmp_path).see("swapped.png"), ignoring.see("swapped.png"))


def test_make_batch__reads_a_conversation_once(data: ConversationData, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()
    one = ConversationFile.__getitem__
    monkeypatch.setattr(ConversationFile, "__getitem__", lambda self, index: (read.append(index), one(self, index))[1])
    MakeBatch(data, Shuffled(COUNT, 0))(np.arange(COUNT))
    assert sorted(read) == list(range(COUNT))


def test_make_batch__packed_rows_have_the_same_likelihoods(data: ConversationData) -> None:
    model = tiny(vocab_size=data.tokenizer.size)
    positions = np.arange(8)
    loose, packed = (MakeBatch(data, Shuffled(COUNT, 0), packing)(positions) for packing in (False, True))
    assert sorted(rows_of(loose)) == sorted(rows_of(packed))
    assert len(packed) < len(loose) and packed.ids.shape[1] <= LENGTH
    assert packed.images_per_row.sum() == loose.images_per_row.sum() == len(packed.images)
    with torch.no_grad():
        one, other = (model(batch).double().sum().item() for batch in (loose, packed))
    assert one == pytest.approx(other, rel=1e-5)


def test_pack__fills_rows_and_keeps_every_sample() -> None:
    rows = pack([10, 60, 30, 20, 64, 4], 64)
    assert rows == [[4], [1, 5], [2, 3, 0]]
    assert pack([], 64) == []


def test_features__are_the_models_and_each_image_is_encoded_once(
    folder: Path, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(folder, vlm.config, features=torch.float32)
    make, pixels = MakeBatch(data, Shuffled(COUNT, 0)), MakeBatch(opened(folder, vlm.config), Shuffled(COUNT, 0))
    positions = np.arange(COUNT)
    batch = make(positions)
    assert batch.features is not None and len(batch.images) == 0
    torch.testing.assert_close(batch.features, vlm.image_features(pixels(positions).images), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("qlip.vlm.data.pixels_of", lambda *_: pytest.fail("read again"))
    assert torch.equal(make(positions).features, batch.features)  # type: ignore[arg-type]
    text = next(
        place for place in range(COUNT) if not data.conversations[Shuffled(COUNT, 0)(np.array([place]))[0]].images
    )
    found = make(np.array([text])).features
    assert found is not None and found.shape == (0, N, vlm.config.feature_size)


def test_make_batch__samples_that_teach_nothing_are_named(
    folder: Path, vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    data = opened(folder, vlm.config)
    (tmp_path / "text.png").write_text("no image")
    turns = (Turn("user", f"{IMAGE} what"), Turn("assistant", "red"))
    conversations = [
        Conversation("good", (Image.new("RGB", (9, 9)),), turns),
        Conversation("broken", ("text.png",), turns),
        Conversation("absent", ("absent.png",), turns),
        Conversation("long", (), (Turn("user", "red " * 99), Turn("assistant", "red"))),
        Conversation("cut", (), (Turn("user", "x"), Turn("assistant", "red " * 99))),
        Conversation("silent", (), (Turn("user", "x"),)),
        Conversation("doubled", (Image.new("RGB", (9, 9)),), (Turn("user", IMAGE * 2), Turn("assistant", "red"))),
    ]
    values = {"conversations": conversations, "folder": tmp_path}
    changed = ConversationData(
        **{name: values.get(name, value) for name, value in vars(data).items() if name[0] != "_"}
    )
    batch = MakeBatch(changed, lambda positions: positions)(np.arange(len(conversations)))
    assert len(batch) == 2 and len(batch.images) == 1
    assert batch.cut_per_row is not None and batch.cut_per_row.tolist() == [0, 1]
    reasons = {one.key: one.reason for one in batch.skipped}
    assert list(reasons) == ["broken", "absent", "long", "silent", "doubled"]
    assert "text.png" in reasons["broken"] and "absent.png" in reasons["absent"]
    assert "no label fits in max_length 64" in reasons["long"]
    assert "no answer to learn from" in reasons["silent"] and "stands 2 times" in reasons["doubled"]
    empty = MakeBatch(changed, lambda positions: positions)(np.array([1]))
    assert len(empty) == 0 and len(empty.skipped) == 1


def test_see__an_image_that_is_too_long_to_be_made_square_is_named(data: ConversationData, tmp_path: Path) -> None:
    Image.new("L", (20_000, 8)).save(tmp_path / "strip.png")
    padded = replace(data, config=data.config.model_copy(update={"pad_images": True}))
    with pytest.raises(QLIPError, match=r"strip.png: an image of 20,000 x 8 pixels cannot be made square"):
        padded.see(str(tmp_path / "strip.png"))
    assert data.see(str(tmp_path / "strip.png")).shape == (3, 64, 64)


@pytest.mark.parametrize("size", [1, 7, 40, 67])
def test_grouped__batches_are_alike_and_no_conversation_is_lost(size: int) -> None:
    rng = np.random.default_rng(size)
    lengths, has_images = rng.integers(1, 100, size), rng.random(size) < 0.6
    order = Grouped(has_images, lambda indices: lengths[indices], batch_size=4, seed=1)
    positions = np.arange(3 * size)
    found = order(positions)
    for epoch in range(3):
        assert sorted(found[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert np.array_equal(pickle_copy(order)(positions[size // 2 :]), found[size // 2 :])
    if size < 40:
        return
    batches = [found[begin : begin + 4] for begin in range(0, 3 * size - 3, 4)]
    mixed = [one for one in batches if len(set(has_images[one])) > 1]
    assert len(mixed) <= 3 * 3
    spread = np.mean([np.ptp(lengths[one]) for one in batches])
    shuffled = Shuffled(size, 1)(positions)
    assert spread < 0.6 * np.mean([np.ptp(lengths[shuffled[begin : begin + 4]]) for begin in range(0, 3 * size - 3, 4)])
    assert not np.array_equal(found[:size], found[size : 2 * size])


def pickle_copy(order: Grouped) -> Grouped:
    """What a worker has."""
    copy = Grouped.__new__(Grouped)
    copy.__setstate__(order.__getstate__())
    return copy


@pytest.mark.parametrize("group", [False, True])
def test_open_feed__resumes_and_shares_among_ranks(data: ConversationData, group: bool) -> None:
    feed = open_feed(data, 6, seed=4, group_by_length=group)
    batches = feed.open(None)
    found = [next(batches) for _ in range(5)]  # beyond the end of the first epoch
    for rank in range(2):
        later, _ = next(feed.open(json.loads(json.dumps(found[2][1])), rank=rank, world=2))
        half = slice(3 * rank, 3 * rank + 3)
        assert rows_of(later) == rows_of(found[3][0])[half]
    names = [one for batch, _ in found for one in rows_of(batch)][:COUNT]
    assert sorted(names) == sorted(tuple(data.example(index).ids.tolist()) for index in range(COUNT))
    assert len(pickle.dumps(feed.make)) > 0
    with pytest.raises(QLIPError, match=r"train.json: the saved state has seed 4, this feed 5"):
        next(open_feed(data, 6, seed=5, group_by_length=group).open(found[0][1]))


def test_open_feed__faults_are_named_before_training(folder: Path, vlm: VisionLanguageModel, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="max_length 16: an image alone takes 16 tokens"):
        open_feed(opened(folder, vlm.config, max_length=16), 4, seed=0)
    data = opened(folder, vlm.config)
    absent = ConversationData(**{k: v for k, v in vars(data).items() if k[0] != "_"} | {"folder": tmp_path / "x"})
    with pytest.raises(QLIPError, match="no such folder; give the folder that the paths of the images start from"):
        open_feed(absent, 4, seed=0)
    items = json.loads((folder / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps([*items, {"id": "odd"}]))
    with pytest.warns(QLIPWarning, match=r"train.json: 1 of 21 items left out: item 20 \(odd\): has no list"):
        open_feed(opened(tmp_path, vlm.config), 4, seed=0)
