"""Model, tokenizer and preprocessing that a recipe starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel, config_of
from qlip.lm.causal_config import CausalConfig
from qlip.lm.sampling import AnswerSettings
from qlip.lm.tokenizer import LLMTokenizer
from qlip.lm.vocabulary import train_tokenizer
from qlip.modeling.checkpoint import Files, lasting, resolve
from qlip.modeling.config import QLIPConfig
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.modeling.vision import VisionTower
from qlip.vlm import lora
from qlip.vlm.config import VLMConfig
from qlip.vlm.images import read_vlm_preprocessing
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.templates import TEMPLATES, check_tokens, template_of
from qlip.vlm.training.recipe import ModelSection, VLMRecipe


@dataclass(frozen=True)
class Start:
    """Model, tokenizer and preprocessing of a training at its start.

    Attributes:
        model: in training mode, with ``requires_grad`` set as the recipe says.
        tokenizer: of the text decoder.
        preprocessing: of images.
        sources: where the weights of parts that do not train come from.
        settings: how the trained model answers.
    """

    model: VisionLanguageModel
    tokenizer: LLMTokenizer
    preprocessing: Preprocessing
    sources: dict[str, str]
    settings: AnswerSettings = AnswerSettings()

    def save(self, folder: Path) -> None:
        """Write tokenizer, preprocessing and settings."""
        self.tokenizer.save(folder)
        self.settings.save(folder)
        QLIPProcessor(self.preprocessing).save_pretrained(folder)


def open_start(recipe: VLMRecipe, texts: Callable[[], Iterable[str]]) -> Start:
    """Load or make the model of a recipe, on the CPU.

    Args:
        recipe: of the run.
        texts: returns texts to train a vocabulary on, for a text decoder of random weights.

    Raises:
        QLIPError: no such folder, a text decoder without tokenizer or with an unknown chat template, or parts that do
            not fit each other.
    """
    section = recipe.model
    if section.init is not None:
        model = VisionLanguageModel.from_pretrained(section.init)
        folder = resolve(section.init)
        tokenizer = LLMTokenizer.from_folder(folder)
        preprocessing = read_vlm_preprocessing(folder, model.config)
        sources = {"tower": model.config.vision_tower, "llm": model.config.language_model or section.init}
        if section.template is not None:
            model.config = model.config.model_copy(update={"template": section.template})
        check_tokens(TEMPLATES[model.config.template], tokenizer)
    else:
        qlip = QLIPModel.from_pretrained(section.vision_tower)
        preprocessing = QLIPProcessor.from_pretrained(section.vision_tower).preprocessing
        if section.llm is not None:
            tokenizer = LLMTokenizer.from_folder(section.llm)
            template = _template(section, tokenizer)
            llm = CausalModel.from_pretrained(section.llm)
            _check_vocabulary(tokenizer, llm.config, section.llm)
        else:
            tokenizer = train_tokenizer(texts(), section.vocabulary)
            template = _template(section, tokenizer)
            llm = CausalModel(section.build(tokenizer.size))
        config = _config(recipe, qlip.config, llm.config, qlip.code_fingerprint, template)
        if section.llm is not None:
            config = config.model_copy(update={"language_fingerprint": llm.fingerprint})
        model = VisionLanguageModel.from_parts(config, qlip.vision_model, llm)
        sources = {"tower": section.vision_tower, "llm": section.llm or ""}
    if recipe.data.max_length > (most := model.config.text_config.length):
        raise QLIPError(
            f"data.max_length {recipe.data.max_length:,}: the text decoder reads {most:,} positions; lower it"
        )
    prepare(model, recipe)
    settings = AnswerSettings(single_turn=recipe.data.questions is not None)
    return Start(model, tokenizer, preprocessing, sources, settings)


def without_weights(recipe: VLMRecipe) -> tuple[VisionLanguageModel, tuple[int, int]]:
    """Make the model of a recipe from configurations alone, and the size of its images; for a dry run.

    Raises:
        QLIPError: a configuration cannot be read.
    """
    section = recipe.model
    if section.init is not None:
        folder = resolve(section.init)
        config = VLMConfig.from_file(folder / "config.json")
        size = read_vlm_preprocessing(folder, config).size
        model = VisionLanguageModel.from_parts(
            config, VisionTower(config.vision_config), CausalModel(config.text_config)
        )
    else:
        vision = Files(section.vision_tower).config()
        if section.llm is None:
            text = section.build(section.vocabulary)
        else:
            text = config_of(Files(section.llm))
        config = _config(recipe, vision, text, None, section.template or "v1")  # no template changes a size
        model = VisionLanguageModel.from_parts(config, VisionTower(vision.vision_config), CausalModel(text))
        size = QLIPProcessor.from_pretrained(section.vision_tower).size
    prepare(model, recipe)
    return model, size


def prepare(model: VisionLanguageModel, recipe: VLMRecipe) -> None:
    """Set what trains and what the folder will hold; frozen parts take the recipe's precision."""
    config = model.config
    update: dict[str, object] = {"own_tower": config.own_tower or "tower" in recipe.train}
    if recipe.data.conversations is not None:
        update["pad_images"] = recipe.data.pad_images
    parts: dict[str, nn.Module] = {"tower": model.tower, "projector": model.projector, "llm": model.llm}
    for name, part in parts.items():
        part.requires_grad_(name in recipe.train)
        if name == "tower" and name in recipe.train:
            _freeze_unread(model)
        if name not in recipe.train and recipe.precision == "bfloat16":
            for one in part.parameters():
                one.data = one.data.to(torch.bfloat16)  # tensors without memory cannot be moved by `Module.to`
    if recipe.lora is not None:
        section = recipe.lora
        update["lora"] = lora.add(model.llm, section.targets, section.rank, section.alpha, section.dropout)
    elif "llm" in recipe.train:
        update |= {"language_model": None, "language_fingerprint": None}
    model.config = config.model_copy(update=update)
    model.train()
    for name, part in parts.items():
        if name not in recipe.train:
            part.eval()


def _freeze_unread(model: VisionLanguageModel) -> None:
    """Freeze what stands behind the layer of the tower that is read: it has no gradient."""
    tower, layer = model.tower, model.config.layer
    tower.post_layernorm.requires_grad_(False)
    if layer != "quantized":
        tower.encoder.layers[tower.num_layers_of(layer) :].requires_grad_(False)
        for one in (tower.quant_embed, tower.quant_embed_post):
            if one is not None:
                one.requires_grad_(False)


def _template(section: ModelSection, tokenizer: LLMTokenizer) -> str:
    """Name of the recipe's template, or of the text decoder's own."""
    template = (
        TEMPLATES[section.template] if section.template else template_of(tokenizer.chat_template, section.llm or "")
    )
    check_tokens(template, tokenizer)
    return template.name


def _config(
    recipe: VLMRecipe, vision: QLIPConfig, text: CausalConfig, fingerprint: str | None, template: str
) -> VLMConfig:
    section = recipe.model
    return VLMConfig(
        vision_tower=lasting(section.vision_tower),
        vision_fingerprint=fingerprint,
        vision_config=vision.vision_config,
        layer=section.layer,
        pool=section.pool,
        template=template,
        language_model=None if section.llm is None else lasting(section.llm),
        text_config=text,
    )


def _check_vocabulary(tokenizer: LLMTokenizer, config: CausalConfig, where: str) -> None:
    if tokenizer.size > config.vocab_size:
        raise QLIPError(
            f"{where}: its tokenizer has {tokenizer.size:,} ids, its model rows for {config.vocab_size:,}; is the"
            " tokenizer another model's?"
        )
