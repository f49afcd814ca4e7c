"""The processor of the result: how its image tower was shown images, and CLIP's vocabulary."""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from tokenizers import pre_tokenizers

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.modeling.config import QLIPConfig
from qlip.modeling.convert.configs import FIRST_RELEASE_EOS
from qlip.modeling.convert.tower import Tower
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.modeling.tokenizer import BOS, EOS, WORD_END, CLIPTokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""What EVA-02, EVA-CLIP and OpenCLIP show their towers (arXiv 2103.00020)."""


def build_processor(
    config: QLIPConfig, vision: Tower | None, text: Tower | None, tokenizer: str | Path | None
) -> tuple[QLIPProcessor, list[str]]:
    """A processor for the result.

    Args:
        config: of the result.
        vision: its image tower's source, whose normalisation of pixels is kept.
        text: its text tower's source, whose vocabulary is taken where the source is a QLIP checkpoint.
        tokenizer: CLIP's merges (``bpe_simple_vocab_16e6.txt.gz``) or a folder with a vocabulary's files.

    Returns:
        The processor, and a line for each thing worth saying.

    Raises:
        QLIPError: the vocabulary cannot be read, or is not the text tower's.
    """
    words = _tokenizer(config, text, tokenizer)
    preprocessing = _preprocessing(config, vision)
    mean = ", ".join(f"{value:.3g}" for value in preprocessing.mean)
    notes = [f"pixels are normalised with mean {mean}"]
    if words is None:
        notes.append(
            "no vocabulary: the checkpoint cannot read text yet; --tokenizer takes CLIP's bpe_simple_vocab_16e6.txt.gz"
            " or a folder with vocab.json and merges.txt"
        )
    return QLIPProcessor(preprocessing, words), notes


def _preprocessing(config: QLIPConfig, vision: Tower | None) -> Preprocessing:
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if vision is None:
        return Preprocessing((side, side), side, patch_size=patch)
    if vision.source.folder is None:
        return Preprocessing((side, side), side, mean=CLIP_MEAN, std=CLIP_STD, patch_size=patch)
    given = QLIPProcessor.from_pretrained(vision.source.folder).preprocessing
    edge = None if given.shortest_edge is None else side
    return replace(given, size=(side, side), shortest_edge=edge, patch_size=patch)


def _tokenizer(config: QLIPConfig, text: Tower | None, given: str | Path | None) -> CLIPTokenizer | None:
    length, size = config.text_config.max_position_embeddings, config.text_config.vocab_size
    if given is not None:
        path = Path(given).expanduser()
        if path.is_dir():
            words = CLIPTokenizer.from_folder(path, length)
            if words is None:
                raise QLIPError(f"{given}: holds no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
        else:
            words = clip_tokenizer(path, size, length)
    elif text is not None and text.source.folder is not None:
        given, words = text.source.name, CLIPTokenizer.from_folder(text.source.folder, length)
    else:
        words = None
    end = config.text_config.eos_token_id
    if words is not None and (words.vocab_size > size or end not in (words.eos, FIRST_RELEASE_EOS)):
        raise QLIPError(
            f"{given}: a vocabulary of {words.vocab_size} with end token {words.eos}; the text tower's has {size} and"
            f" {end}"
        )
    return words


def clip_tokenizer(path: Path, vocab_size: int, length: int) -> CLIPTokenizer:
    """CLIP's vocabulary from its file of merges.

    The ids are the 256 bytes, the bytes that end a word, one a merge, and the two special tokens; the file's first line
    is its version, and merges beyond the vocabulary's size are not used (arXiv 2103.00020).

    Args:
        path: ``bpe_simple_vocab_16e6.txt.gz``, or the same unpacked.
        vocab_size: 49,408 for CLIP's towers.
        length: positions of the text tower.

    Raises:
        QLIPError: no such file, not such a file, or too few merges for the size.
    """
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")[1:]
    except FileNotFoundError:
        raise QLIPError(f"{path}: no such file; CLIP's merges are in bpe_simple_vocab_16e6.txt.gz") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise QLIPError(f"{path}: not a list of merges ({type(error).__name__}); fetch it again") from None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    merges = [line for line in lines if line][: max(0, vocab_size - len(base) - 2)]
    if len(base) + len(merges) + 2 != vocab_size or any(line.count(" ") != 1 for line in merges):
        raise QLIPError(f"{path}: not the merges of a vocabulary of {vocab_size}; the text tower needs its own")
    tokens = [*base, *(line.replace(" ", "") for line in merges), BOS, EOS]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        write_text(Path(folder) / "vocab.json", json.dumps(vocabulary))
        write_text(Path(folder) / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
        words = CLIPTokenizer.from_folder(Path(folder), length)
    assert words is not None
    return words
