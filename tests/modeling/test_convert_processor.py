"""A converted checkpoint's processor: pixels as its tower was shown them, CLIP's vocabulary from its file of merges."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlip import QLIPConfig, QLIPError, QLIPModel, QLIPProcessor
from qlip.modeling import CLIPTokenizer, Preprocessing
from qlip.modeling.convert import Sizes, convert
from qlip.modeling.convert.processor import CLIP_MEAN, CLIP_STD
from tests.modeling.convert_sources import config_of, make

VOCABULARY = 530
CAPTIONS = ["a photo of a cat", "two dogs on the grass", "a diagram"] * 5


@pytest.fixture
def words() -> CLIPTokenizer:
    return CLIPTokenizer.train(CAPTIONS, VOCABULARY, length=10)


@pytest.fixture
def merges(tmp_path: Path, words: CLIPTokenizer) -> Path:
    """The merges as CLIP publishes its own: gzipped, a version line first, more lines than are used."""
    words.save(tmp_path / "words")
    learned = (tmp_path / "words" / "merges.txt").read_text().splitlines()[1:]
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *learned, "zz zz"]).encode()))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.safetensors"
    save_file(make("eva02_clip_base", vocabulary=VOCABULARY), path)
    return path


def config(**changes: dict[str, object]) -> QLIPConfig:
    text = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    return QLIPConfig.from_dict(config_of(text=text, **changes))


def test_from_merges__rebuilds_the_trained_vocabulary(merges: Path, words: CLIPTokenizer) -> None:
    assert words.vocab_size == VOCABULARY
    for path in (merges, merges.with_suffix("")):
        if path.suffix != ".gz":
            path.write_bytes(gzip.decompress(merges.read_bytes()))
        read = CLIPTokenizer.from_merges(path, VOCABULARY, 10)
        for text in (*CAPTIONS[:3], "It's 25 zebras,\n réunis!", ""):
            assert torch.equal(read([text])[0], words([text])[0])


@pytest.mark.parametrize("given", ["merges", "words"])
def test_converted_checkpoint__reads_text_and_images(
    tmp_path: Path, clip: Path, merges: Path, words: CLIPTokenizer, given: str
) -> None:
    made = convert(clip, clip, config=config(), tokenizer=merges if given == "merges" else tmp_path / "words")
    made.save(tmp_path / "made")
    processor, model = QLIPProcessor.from_pretrained(tmp_path / "made"), QLIPModel.from_pretrained(tmp_path / "made")
    batch = processor(text=["a photo of a cat"])
    assert torch.equal(batch["input_ids"], words(["a photo of a cat"])[0])
    stored = model.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in made.model.state_dict().items())
    assert processor.preprocessing == made.processor.preprocessing
    assert (processor.preprocessing.mean, processor.preprocessing.std) == (CLIP_MEAN, CLIP_STD)
    assert processor.size == (28, 28)
    assert model.code_fingerprint == made.model.code_fingerprint


def test_report__notes_an_absent_vocabulary(clip: Path) -> None:
    made = convert(clip, clip, config=config())
    assert made.processor.tokenizer is None
    assert any("cannot read text yet; give a tokenizer" in note for note in made.report.notes)


def test_build_processor__keeps_a_qlips_own(tmp_path: Path, words: CLIPTokenizer) -> None:
    folder = tmp_path / "trained"
    QLIPModel(config()).save_pretrained(folder)
    shown = Preprocessing((28, 28), None, resample=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), patch_size=7)
    QLIPProcessor(shown, words).save_pretrained(folder)
    made = convert(folder, folder, sizes=Sizes(image_size=56)).processor
    assert made.preprocessing == Preprocessing((56, 56), None, 2, shown.mean, shown.std, 7)
    assert made.tokenizer is not None and made.tokenizer.vocab_size == VOCABULARY
    assert convert(text=folder, config=config()).processor.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; CLIP's merges are in bpe_simple_vocab_16e6.txt.gz"),
        (b"\x1f\x8bnot gzip at all", r"not a list of merges \(\w+\); fetch it again"),
        (b"\xff\xfe", r"not a list of merges \(UnicodeDecodeError\)"),
        (b"#version\na b\n", "not the merges of a vocabulary of 530"),
        (b"#version\n" + b"one two three\n" * 40, "not the merges of a vocabulary of 530"),
        (b"#version\n" + b"zz qq\n" * 40, "merges 'qq', which is not in the vocabulary"),
    ],
)
def test_from_merges__other_files_are_refused(tmp_path: Path, clip: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "merges.txt.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QLIPError, match=said) as error:
        convert(clip, clip, config=config(), tokenizer=path)
    assert "\n" not in str(error.value)


def test_build_processor__vocabulary_of_another_size_is_refused(tmp_path: Path, clip: Path) -> None:
    CLIPTokenizer.train(CAPTIONS, 520, length=10).save(tmp_path / "other")
    with pytest.raises(QLIPError, match="a vocabulary of 520 with end token 519; the text tower needs 530 and 529"):
        convert(clip, clip, config=config(), tokenizer=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QLIPError, match="holds no vocabulary"):
        convert(clip, clip, config=config(), tokenizer=tmp_path / "empty")
