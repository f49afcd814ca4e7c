"""The processor of the result: the preprocessing its image tower was trained with, and CLIP's vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlip.errors import QLIPError
from qlip.modeling.config import QLIPConfig
from qlip.modeling.convert.configs import FIRST_RELEASE_EOS
from qlip.modeling.convert.rules import Tower
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.modeling.tokenizer import CLIPTokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of pixels in EVA-02, EVA-CLIP and OpenCLIP (arXiv 2103.00020)."""


def build_processor(
    config: QLIPConfig, vision: Tower | None, text: Tower | None, tokenizer: str | Path | None
) -> tuple[QLIPProcessor, list[str]]:
    """Build a processor for the result.

    Args:
        config: the result's.
        vision: the image tower, whose normalisation of pixels is kept.
        text: the text tower, whose vocabulary is taken if the source is a QLIP checkpoint.
        tokenizer: CLIP's merges (``bpe_simple_vocab_16e6.txt.gz``) or a folder with a vocabulary's files.

    Returns:
        The processor, and notes for the report.

    Raises:
        QLIPError: the vocabulary cannot be read, or does not fit the text tower.
    """
    vocabulary = _tokenizer(config, text, tokenizer)
    preprocessing, notes = _preprocessing(config, vision), []
    if vocabulary is None:
        notes.append(
            "no vocabulary: the checkpoint cannot read text yet; give a tokenizer: CLIP's bpe_simple_vocab_16e6.txt.gz"
            " or a folder with vocab.json and merges.txt"
        )
    return QLIPProcessor(preprocessing, vocabulary), notes


def describe_normalization(preprocessing: Preprocessing) -> str:
    """One line: the normalisation of pixels, and how much more the reconstruction loss weighs than from scratch."""
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    usual = Preprocessing(preprocessing.size, None).std
    times = sum((ours / theirs) ** 2 for ours, theirs in zip(usual, preprocessing.std, strict=True)) / len(usual)
    line = f"pixels are normalised with mean {mean} and deviation {std}"
    if abs(times - 1) < 0.05:
        return line
    return (
        f"{line}: squared errors, and so the same alpha_r, weigh {times:.1f} times as much as in a model from scratch;"
        f" divide alpha_r by {times:.1f}, or fold the normalisation into the patch embedding"
    )


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
        if not path.is_dir():
            tokenizer: CLIPTokenizer | None = CLIPTokenizer.from_merges(path, size, length)
        elif (tokenizer := CLIPTokenizer.from_folder(path, length)) is None:
            raise QLIPError(f"{given}: holds no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
    elif text is not None and text.source.folder is not None:
        given, tokenizer = text.source.name, CLIPTokenizer.from_folder(text.source.folder, length)
    else:
        return None
    end = config.text_config.eos_token_id
    if tokenizer is not None and (tokenizer.vocab_size > size or end not in (tokenizer.eos, FIRST_RELEASE_EOS)):
        raise QLIPError(
            f"{given}: a vocabulary of {tokenizer.vocab_size} with end token {tokenizer.eos}; the text tower needs"
            f" {size} and {end}"
        )
    return tokenizer
