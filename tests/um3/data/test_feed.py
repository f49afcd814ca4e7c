"""The feed: shares of the kinds at any step, exact resumption, one stream for any number of workers and ranks."""

from __future__ import annotations

import itertools
import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qlip import QLIPError, QLIPModel
from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import BLOCK, ScheduledMixture
from qlip.errors import QLIPWarning
from qlip.um3.batch import KINDS, UM3Batch
from qlip.um3.data.config import DataSection
from qlip.um3.data.feed import MakeBatch, first_texts, open_feed
from qlip.um3.data.mixture import SourceWeights
from qlip.um3.sequence import Grammar
from tests.um3.data.made import TEXTS, config, dataset, jsonl, tokenizer

FIELDS = ("ids", "documents", "positions", "kinds", "dropped")
LENGTH = 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sources of all kinds."""
    home = tmp_path_factory.mktemp("sources")
    tokens = dataset(home / "tokens")
    texts = jsonl(home / "texts.jsonl", [{"text": one * 3} for one in TEXTS * 5])
    lines = [["A cat:", {"image": "000-0001"}, "a dog:", {"image": "001-0002"}, text * 4] for text in TEXTS]
    return {
        "text": [{"path": texts}],
        "images": [{"tokens": tokens}],
        "interleaved": [{"path": jsonl(home / "interleaved.jsonl", lines), "tokens": tokens}],
        "mixture": {"text": (4, 1), "calm_down_steps": 20},
        "length": LENGTH,
    }


def opened(values: dict[str, Any], batch_size: int = 6, seed: int = 0, **changes: Any) -> PositionFeed[UM3Batch]:
    return open_feed(DataSection(**values | changes), config(), tokenizer(), batch_size, seed)


def take(feed: PositionFeed[UM3Batch], count: int, state: Any = None, **ranks: int) -> list[UM3Batch]:
    stream = feed.open(state, **ranks)
    found = [batch for batch, _ in itertools.islice(stream, count)]
    stream.close()
    return found


def same(one: UM3Batch, other: UM3Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_feed__rows_hold_whole_documents_of_all_kinds(sources: dict[str, Any]) -> None:
    grammar, kinds = Grammar(config()), set[int]()
    for batch in take(opened(sources), 20):
        assert not batch.skipped
        for ids, documents, of_kind, positions in zip(
            batch.ids, batch.documents, batch.kinds, batch.positions, strict=True
        ):
            kinds |= set(of_kind[documents >= 0].tolist())
            for number in range(int(documents.max()) + 1):
                mine = documents == number
                grammar.check(ids[mine])
                assert positions[mine].tolist() == list(range(int(mine.sum())))
    assert kinds == set(range(len(KINDS)))


@given(
    first=st.floats(0, 99),
    last=st.floats(0, 99),
    steps=st.integers(0, 10_000),
    batch_size=st.integers(1, 600),
    block=st.integers(0, 3_000),
)
@settings(max_examples=50)
def test_feed__shares_in_any_block_are_those_of_the_calm_down(
    first: float, last: float, steps: int, batch_size: int, block: int
) -> None:
    mixture = {"text": (first, last), "calm_down_steps": steps}
    section = DataSection(text=[{"path": "a.txt"}], images=[{"scenes": "captioned"}], mixture=mixture)
    weights = SourceWeights(section, batch_size, KINDS[:3], (1.0, 1.0, 1.0))
    order = ScheduledMixture(KINDS[:3], [7, None, None], weights, 0)
    counts = Counter(order.sources_at(np.arange(block * BLOCK, (block + 1) * BLOCK)).tolist())
    passed = min(1.0, block * BLOCK // batch_size / steps) if steps else 1.0
    text = first + (last - first) * passed
    wanted = [one / (text + 4) * BLOCK for one in (text, 1, 3)]
    for number, exact in enumerate(wanted):
        assert abs(counts[number] - exact) < 2, (number, exact)  # the smallest share gets one


def test_feed__two_sources_of_a_kind_divide_its_share() -> None:
    section = DataSection(text=[{"path": "a.txt"}, {"path": "b.txt"}], images=[{"scenes": "captioned"}])
    weights = SourceWeights(section, 8, ("text", "text", "image-to-text", "text-to-image"), (3.0, 1.0, 1.0, 1.0))
    assert weights(0) == pytest.approx([45 / 64, 15 / 64, 1 / 64, 3 / 64])


def test_feed__resumes_at_any_step_with_the_same_rows(sources: dict[str, Any]) -> None:
    whole = list(itertools.islice(opened(sources).open(None), 8))
    for stop in range(1, 8):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        [again] = take(opened(sources), 1, state)
        assert same(again, whole[stop][0])
    far = {**whole[0][1], "position": 6 * 400}  # behind the calm-down
    assert same(take(opened(sources), 3, far)[2], take(opened(sources), 1, far | {"position": 6 * 402})[0])


def test_feed__ranks_share_one_stream_which_workers_make_too(sources: dict[str, Any]) -> None:
    whole = take(opened(sources), 4)
    feed = opened(sources)
    feed.make = pickle.loads(pickle.dumps(feed.make))
    shares = [take(feed, 4, None, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name in FIELDS:
            assert torch.equal(getattr(batch, name), torch.cat([getattr(first, name), getattr(second, name)]))


def test_feed__a_state_of_other_data_is_refused(sources: dict[str, Any], tmp_path: Path) -> None:
    state = opened(sources).state(12)
    other = dataset(tmp_path / "tokens", seed=1)
    changes: list[dict[str, Any]] = [
        {"images": [{"tokens": other}]},
        {"mixture": {"text": (4, 2), "calm_down_steps": 20}},
        {"length": LENGTH + 1},
        {"document_masks": False},
    ]
    for change in changes:
        with pytest.raises(QLIPError, match="the saved state has"):
            take(opened(sources, **change), 1, state)
    with pytest.raises(QLIPError, match="the saved state has mixture"):
        take(opened(sources, batch_size=5), 1, state)


def test_feed__every_text_once_per_epoch_and_in_another_order_in_the_next(sources: dict[str, Any]) -> None:
    values = {"text": sources["text"], "length": 30}
    feed = opened(values, batch_size=1)
    assert isinstance(feed.make, MakeBatch)
    size = feed.make.sources[0].size
    assert size is not None
    rows = [tuple(batch.ids[0].tolist()) for batch in take(feed, 2 * size)]
    assert Counter(rows[:size]) == Counter(rows[size:]) and rows[:size] != rows[size:]
    own = tokenizer()
    kept = [id_ for row in rows[:size] for id_ in row if id_]
    wanted = [id_ for text in TEXTS * 5 for id_ in [*own.encode(text * 3), own.eos]]
    assert Counter(kept) == Counter(wanted)


def test_feed__without_document_masks_a_row_is_one_document(sources: dict[str, Any]) -> None:
    [batch], [plain] = take(opened(sources), 1), take(opened(sources, document_masks=False), 1)
    assert plain.ids.equal(batch.ids) and set(plain.documents.flatten().tolist()) <= {0, -1}
    assert (batch.documents > 0).any()


def test_feed__image_files_are_encoded_and_broken_ones_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "no.png").write_bytes(b"no image")
    lines = [["red", {"image": name}] for name in ("red.png", "no.png", "absent.png")]
    path = jsonl(tmp_path / "a.jsonl", lines)
    model = QLIPModel.from_pretrained("bundled")
    own = config(grid=(8, 8), vision_fingerprint=model.code_fingerprint)
    section = DataSection(interleaved=[{"path": path, "images": str(tmp_path)}], length=900)
    with pytest.warns(QLIPWarning, match=r"line 3: there is no image 'absent.png'"):  # before the training
        feed = open_feed(section, own, tokenizer(), 1, 0)
    [batch] = take(feed, 1)
    assert [one.reason.split(":")[0].rsplit("/")[-1] for one in batch.skipped] == ["no.png"]
    assert int((batch.documents[0] >= 0).sum()) == len(tokenizer().encode("red")) + 258 + 1
    assert batch.dropped.tolist() == [len(tokenizer().encode("red")) + 258 + 1]
    refused = config(grid=(8, 8))
    with pytest.raises(QLIPError, match="bundled: tokens of the QLIP"):
        open_feed(section, refused, tokenizer(), 1, 0)


def test_open_feed__what_does_not_fit_is_one_line(sources: dict[str, Any]) -> None:
    with pytest.raises(QLIPError, match="two sources are .*texts.jsonl; name each once"):
        opened(sources, text=sources["text"] * 2)
    with pytest.raises(QLIPError, match="length 18: a row cannot hold an image"):
        opened({"interleaved": sources["interleaved"], "length": 18})
    section = DataSection(text=sources["text"])
    with pytest.raises(QLIPError, match="the tokenizer has 300 ids, the model 200 text rows"):
        small = config().to_dict()
        small["decoder"]["vocab_size"], small["text_vocab_size"] = 200 + 128, 200
        open_feed(section, type(config()).from_dict(small), tokenizer(), 2, 0)


def test_first_texts__are_of_all_sources(sources: dict[str, Any]) -> None:
    section = DataSection(**sources)
    found = list(first_texts(section))
    assert TEXTS[0] * 3 in found and "a dog:" in found and any(one.startswith("an image called") for one in found)
    drawn = DataSection(images=[{"scenes": "captioned"}, {"questions": "train"}])
    words = {word for text in first_texts(drawn) for word in text.split()}
    assert {"circle", "Where", "relative"} <= words


def test_first_texts__many_short_ones_count_as_a_few_long_ones(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 1000)
    (tmp_path / "short.jsonl").write_text('{"text": "yyyyyyyyyy"}\n' * 1000)
    paths = [{"path": str(tmp_path / name)} for name in ("long.txt", "short.jsonl")]
    found = list(first_texts(DataSection(text=paths), characters=95))
    assert found == ["x" * 1000, *["y" * 10] * 10]


def test_data_page__python_block_runs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "um3.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", page.partition("\n## Data\n")[2].partition("\n## ")[0], re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["batch"].ids.shape == (8, 560) and names["state"]["position"] == 8
    section = re.search(r"```yaml\ndata:\n(.*?)```", page, re.DOTALL)
    assert section is not None
    DataSection(**yaml.safe_load(section[1]))
