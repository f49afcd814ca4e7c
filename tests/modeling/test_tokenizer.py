"""CLIP's tokenizer: padding, truncation, files of a vocabulary."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from qlip import QLIPError, QLIPProcessor
from qlip.modeling.tokenizer import CLIPTokenizer
from tests.modeling.helpers import FIXTURE, photo

CAPTIONS = [
    "a photo of a cat",
    "A  photo of\n two CATS, and a dog's tail!",
    "a blurry photo of 1234 birds",
    "naïve café — über 日本語 🙂",
    "",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a small vocabulary of its own."""
    folder = tmp_path_factory.mktemp("vocabulary")
    config = json.loads((FIXTURE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    CLIPTokenizer.train(CAPTIONS * 3, 560, length=12).save(folder)
    return folder


def test_tokenizer__clip_padding_and_truncation(vocabulary: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    tokenizer = processor.tokenizer
    assert tokenizer is not None
    words = processor(text=["a photo of a cat", "a photo of a cat " * 20, ""])
    ids, mask = words["input_ids"], words["attention_mask"]
    assert ids.shape == mask.shape == (3, 12)
    assert ids.dtype == mask.dtype == torch.int64
    begin, end = tokenizer.bos, tokenizer.eos
    assert ids[:, 0].tolist() == [begin] * 3
    for row, count in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row.index(end) == count - 1  # the first end token closes the text
        assert row[count:] == [end] * (12 - count)  # CLIP pads with it
    assert mask[1].tolist() == [1] * 12
    assert ids[1, -1].item() == end
    assert ids[2].tolist() == [begin] + [end] * 11
    assert mask[2].tolist() == [1, 1] + [0] * 10


def test_tokenizer__one_string_is_a_batch_of_one(vocabulary: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    assert torch.equal(processor(text="a cat")["input_ids"], processor(text=["a cat"])["input_ids"])
    both = processor(images=photo(), text="a cat")
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}


def test_tokenizer__both_file_formats_agree(vocabulary: Path, tmp_path: Path) -> None:
    results = []
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in ("config.json", *names):
            shutil.copyfile(vocabulary / name, folder / name)
        results.append(QLIPProcessor.from_pretrained(folder)(text=CAPTIONS))
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(results[0][key], results[1][key])


def test_tokenizer__case_space_and_unseen_letters(vocabulary: Path) -> None:
    tokenizer = CLIPTokenizer.from_folder(vocabulary, 64)
    assert tokenizer is not None
    same = tokenizer(["a photo of a cat", "  A   PHOTO of\ta\ncat "])[0]
    assert torch.equal(same[0], same[1])
    ids, mask = tokenizer(["ЖШ 漢字 🚀 zzzqx"])
    assert tokenizer.decode(ids[0][mask[0].bool()].tolist()) == "жш 漢字 🚀 zzzqx"
    assert ids.max() < tokenizer.vocab_size


def test_tokenizer__tiny_clip_vocabulary_by_hand(tmp_path: Path) -> None:
    """Merges in order of rank, the end-of-word mark, numbers digit by digit, and CLIP's own special tokens."""
    vocab = ["a", "c", "t", "1", "2", "a</w>", "c</w>", "t</w>", "1</w>", "2</w>", "ca", "cat</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = CLIPTokenizer.from_folder(tmp_path, 10)
    assert tokenizer is not None
    ids = tokenizer(["cat CA a 12"])[0][0].tolist()
    assert ids == [12, 11, 1, 5, 5, 8, 9, 13, 13, 13]


def test_processor__text_without_a_vocabulary_is_refused(processor: QLIPProcessor) -> None:
    with pytest.raises(QLIPError, match=r"no vocabulary"):
        processor(text="a cat")
    with pytest.raises(QLIPError, match=r"nothing to process"):
        processor()


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.json", "{"), ("vocab.json", "[1]"), ("vocab.json", '{"a": 0}'), ("merges.txt", "a b c\n")],
)
def test_tokenizer__broken_vocabulary_is_refused_in_one_line(
    vocabulary: Path, tmp_path: Path, name: str, content: str
) -> None:
    for file in ("config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(vocabulary / file, tmp_path / file)
    (tmp_path / name).write_text(content)
    with pytest.raises(QLIPError) as error:
        QLIPProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_tokenizer__broken_tokenizer_file_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    for content in ("{", "{}", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(QLIPError) as error:
            QLIPProcessor.from_pretrained(tmp_path)
        assert "tokenizer.json" in str(error.value)
        assert "\n" not in str(error.value)


def test_processor__round_trip(vocabulary: Path, tmp_path: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    shutil.copyfile(vocabulary / "config.json", tmp_path / "config.json")
    processor.save_pretrained(tmp_path)
    again = QLIPProcessor.from_pretrained(tmp_path)
    assert again.preprocessing == processor.preprocessing
    for key, value in processor(images=photo(70, 50), text=CAPTIONS).items():
        assert torch.equal(again(images=photo(70, 50), text=CAPTIONS)[key], value)


def greedy_merges(words: list[str], number: int) -> list[tuple[str, str]]:
    """Byte-pair encoding as its paper says (arXiv 1508.07909); equal counts by the ids of the pair, smaller first."""
    base = [character for code in range(256) if (character := chr(code)).isascii() and character.isalpha()]
    ids = {token: number for number, token in enumerate([f"{letter}</w>" for letter in base] + base)}
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        left, right = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        merges.append((left, right))
        ids.setdefault(left + right, len(ids))
        for word in pieces:
            for place in range(len(word) - 1):
                if word[place : place + 2] == [left, right]:
                    word[place : place + 2] = [left + right]
    return merges


def test_tokenizer__equal_counts_are_decided_alike_in_every_process() -> None:
    """Each training draws another order of the hash map; letters that end a word used to be numbered in that order."""
    captions = ["a small cat sits on a red chair", "the cat chases a ball", "children watch the march of champions"]
    expected = greedy_merges(" ".join(captions).split(), 30)
    for _ in range(8):
        model = json.loads(CLIPTokenizer.train(captions, 514 + 30, 24).tokenizer.to_str())["model"]
        assert [tuple(pair) for pair in model["merges"]] == expected


def test_tokenizer__names_of_special_tokens_in_a_text_are_text(vocabulary: Path) -> None:
    """A caption can not cut itself off, with either kind of file."""
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        folder = vocabulary.parent / names[0].replace(".", "-")
        folder.mkdir()
        for name in (*names, "tokenizer_config.json"):
            shutil.copyfile(vocabulary / name, folder / name)
        tokenizer = CLIPTokenizer.from_folder(folder, 40)
        assert tokenizer is not None
        ids, mask = tokenizer(["cat <|endoftext|> dog", "<|startoftext|>"])
        for row, count in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
            assert row.index(tokenizer.eos) == count - 1 and row.count(tokenizer.bos) == 1
        assert tokenizer.decode(ids[0].tolist()).replace(" ", "") == "cat<|endoftext|>dog"


def test_tokenizer__html_entities(vocabulary: Path, tmp_path: Path) -> None:
    """New vocabularies read them as open_clip does; published ones, whose files do not say it, as transformers does."""
    new = CLIPTokenizer.from_folder(vocabulary, 24)
    shutil.copytree(vocabulary, tmp_path / "old")
    settings = json.loads((vocabulary / "tokenizer_config.json").read_text())
    assert settings.pop("unescape_html") is True
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings))
    old = CLIPTokenizer.from_folder(tmp_path / "old", 24)
    assert new is not None and old is not None and new.identity() != old.identity() == old.tokenizer.to_str()
    plain = new(["cats & dogs"])[0]
    for text in ("cats &amp; dogs", "cats &amp;amp; dogs", "cats &#38; dogs"):
        assert torch.equal(new([text])[0], plain)
        assert not torch.equal(old([text])[0], plain)
    assert torch.equal(old(["cats & dogs"])[0], plain)


def test_tokenizer__half_a_surrogate_pair_is_replaced(vocabulary: Path) -> None:
    tokenizer = CLIPTokenizer.from_folder(vocabulary, 24)
    assert tokenizer is not None
    ids, _ = tokenizer(["a \ud83d cat", "a \ufffd cat", "a \ud83d\ude42", "a \U0001f642"])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3])
    trained = [CLIPTokenizer.train([text], 560, 24).identity() for text in ("a \ud83d cat", "a \ufffd cat")]
    assert trained[0] == trained[1]
