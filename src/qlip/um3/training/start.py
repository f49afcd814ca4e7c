"""Model, tokenizer and preprocessing that a recipe starts from: from scratch, grown from a text decoder, or a UM3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel, config_of
from qlip.lm.causal_config import CausalConfig
from qlip.lm.tokenizer import CONFIG, LLMTokenizer
from qlip.lm.vocabulary import train_tokenizer
from qlip.modeling.checkpoint import Files, lasting, resolve
from qlip.modeling.config import QLIPConfig
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.um3.config import UM3Config, is_um3
from qlip.um3.model import UM3
from qlip.um3.session import UM3Settings
from qlip.um3.training.recipe import ModelSection, UM3Recipe

BEGIN, END = "<boi>", "<eoi>"
"""Names of the text tokens around an image, where the tokenizer is ours or has none that the recipe names."""


@dataclass(frozen=True)
class Start:
    """Model, tokenizer and preprocessing of a training at its start.

    Attributes:
        model: in training mode.
        tokenizer: of its text rows.
        preprocessing: of images.
        settings: how the trained model writes and draws.
    """

    model: UM3
    tokenizer: LLMTokenizer
    preprocessing: Preprocessing
    settings: UM3Settings

    def save(self, folder: Path) -> None:
        """Write tokenizer, preprocessing and settings."""
        self.tokenizer.save(folder)
        self.settings.save(folder)
        QLIPProcessor(self.preprocessing).save_pretrained(folder)


def make_vocabulary(section: ModelSection, texts: Iterable[str], folder: Path) -> None:
    """Train a vocabulary on texts, unless the recipe needs none or the folder has it; one rank calls it."""
    if section.config and section.tokenizer is None and not (folder / CONFIG).exists():
        train_tokenizer(texts, section.vocabulary, (BEGIN, END)).save(folder)


def open_start(recipe: UM3Recipe, vocabulary: Path) -> Start:
    """Load or make the model of a recipe, on the CPU.

    Args:
        recipe: of the run.
        vocabulary: folder in which :func:`make_vocabulary` has put one, if the recipe needs it.

    Raises:
        QLIPError: no such folder, a text decoder without tokenizer, or parts that do not fit each other.
    """
    section = recipe.model
    if section.init is not None:
        folder = resolve(section.init)
        model, tokenizer = UM3.from_pretrained(folder), LLMTokenizer.from_folder(folder)
    else:
        tower = QLIPModel.from_pretrained(section.vision_tower)
        if section.llm is not None:
            _refuse_um3(section.llm)
            llm, tokenizer = CausalModel.from_pretrained(section.llm), _with_image_tokens(section, section.llm)
            config = _config(section, llm.config, tokenizer, tower.config, tower.code_fingerprint)
            model = UM3.grown(llm, config, section.row_start, recipe.seed)
        else:
            if section.tokenizer is None:
                tokenizer = LLMTokenizer.from_folder(vocabulary)
            else:
                tokenizer = _with_image_tokens(section, section.tokenizer)
            sizes = section.build(tokenizer.size)
            config = _config(section, sizes, tokenizer, tower.config, tower.code_fingerprint)
            model = UM3.from_scratch(config, section.row_start, recipe.seed)
    preprocessing = QLIPProcessor.from_pretrained(model.config.vision_tower).preprocessing
    settings = UM3Settings(single_turn=bool(recipe.data.images) and not recipe.data.interleaved)
    start = Start(model, tokenizer, preprocessing, settings)
    check_length(recipe, start.model.config)
    start.model.train()
    return start


def without_weights(recipe: UM3Recipe) -> UM3:
    """Make the model of a recipe from configurations alone; for a dry run.

    Raises:
        QLIPError: a configuration cannot be read.
    """
    section = recipe.model
    if section.init is not None:
        config = UM3Config.from_folder(resolve(section.init))
    else:
        vision = Files(section.vision_tower).config()
        source = section.llm or section.tokenizer
        tokenizer = None if source is None else _with_image_tokens(section, source)
        if section.llm is None:
            sizes = section.build(section.vocabulary if tokenizer is None else tokenizer.size)
        else:
            _refuse_um3(section.llm)
            sizes = config_of(Files(section.llm))
        config = _config(section, sizes, tokenizer, vision, None)
    check_length(recipe, config)
    return UM3(config).train()


def check_length(recipe: UM3Recipe, config: UM3Config) -> None:
    """Refuse rows that are longer than the decoder's context, or too short for an image and its text.

    Raises:
        QLIPError: names both lengths.
    """
    length, most, least = recipe.data.length, config.decoder.length, config.image_length + 4
    if length > most:
        raise QLIPError(f"data.length {length:,}: the decoder reads {most:,} positions; lower it")
    if length < least and recipe.data.has_images:
        raise QLIPError(
            f"data.length {length:,}: an image alone has {config.image_length:,} ids; give at least {least:,}, and room"
            " for its text"
        )


def _refuse_um3(llm: str) -> None:
    """Refuse a UM3 as the text decoder of another: its visual rows would become text."""
    if is_um3(resolve(llm)):
        raise QLIPError(f"{llm}: is a UM3, not a text decoder; give it as model.init")


def _config(
    section: ModelSection,
    sizes: CausalConfig,
    tokenizer: LLMTokenizer | None,
    vision: QLIPConfig,
    fingerprint: str | None,
) -> UM3Config:
    """Configuration of a new model.

    Args:
        section: of the recipe.
        sizes: of a decoder with text rows alone.
        tokenizer: with the tokens around an image; None has them as its last ones, for a dry run.
        vision: of the tower.
        fingerprint: of the tower's codes.

    Raises:
        QLIPError: a group size that does not divide the bits of a token.
    """
    bits = vision.vision_config.quantizer_cfg.embed_dim
    group_size = section.group_size or vision.vision_config.quantizer_cfg.group_size
    if bits % group_size:
        raise QLIPError(f"group_size {group_size} does not divide {bits} bits, a token of {section.vision_tower}")
    side = vision.vision_config.grid_size
    text_rows = max(sizes.vocab_size, 0 if tokenizer is None else tokenizer.size)
    if tokenizer is None:
        begin, end = text_rows - 2, text_rows - 1
    else:
        begin, end = (tokenizer.token(name) for name in section.image_tokens or (BEGIN, END))
    stops = sizes.eos_token_id if tokenizer is None or section.llm else tokenizer.eos
    return UM3Config.extend(
        sizes.model_copy(update={"eos_token_id": stops}),
        text_vocab_size=text_rows,
        begin_image=begin,
        end_image=end,
        group_size=group_size,
        num_groups=bits // group_size,
        grid=(side, side),
        rows=section.rows,
        softmax=section.softmax,
        vision_tower=lasting(section.vision_tower),
        vision_fingerprint=fingerprint,
    )


def _with_image_tokens(section: ModelSection, folder: str) -> LLMTokenizer:
    """Tokenizer of a folder with the tokens around an image: those that the recipe names, or two further ones.

    Raises:
        QLIPError: no such folder, or it lacks a token that the recipe names.
    """
    tokenizer = LLMTokenizer.from_folder(folder)
    if section.image_tokens is None:
        return tokenizer.with_tokens((BEGIN, END))
    for name in section.image_tokens:
        tokenizer.token(name)
    return tokenizer
