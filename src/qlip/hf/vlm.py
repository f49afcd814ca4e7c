"""Export of a trained vision-language model of `qlip.vlm` as a stock LLaVA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from qlip.errors import QLIPError
from qlip.files import folder_written_aside, write_text
from qlip.hf.chat_template import jinja_of, with_images
from qlip.hf.language import Decoder, json_of
from qlip.hf.llava import Eye, write_llava
from qlip.lm.sampling import FILE as GENERATION
from qlip.lm.sampling import AnswerSettings
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.vlm.config import VLMConfig
from qlip.vlm.images import read_vlm_preprocessing
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.templates import TEMPLATES, Template

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_vlm(
    name: str | Path, folder: Path, dtype: torch.dtype = torch.float32, chat_template: str | None = None
) -> list[Path]:
    """Write a trained model as a folder for stock LLaVA, with equal logits.

    Args:
        name: folder or Hub id of a model of `qlip.vlm`, with its tokenizer.
        folder: created; replaced only as a whole.
        dtype: data type of the stored weights.
        chat_template: Jinja template of turns; by default that of the model's training.

    Returns:
        The files.

    Raises:
        QLIPError: no such model, pooled patches or quantized features, or a folder that cannot be written.
    """
    source = resolve(name)
    config = VLMConfig.from_file(source / "config.json")
    if config.pool != 1:
        raise QLIPError(f"{name}: has one token per {config.pool} x {config.pool} patches, stock LLaVA one per patch")
    if config.layer == "quantized":
        raise QLIPError(f"{name}: reads features behind the quantizer, stock LLaVA those of a layer")
    model = VisionLanguageModel.from_pretrained(source)
    tokenizer = LLMTokenizer.from_folder(source)
    template = TEMPLATES[config.template]
    eye = Eye(
        config.vision_config,
        read_vlm_preprocessing(source, config),
        model.tower.state_dict(),
        model.projector,
        config.layer,
        config.pad_images,
    )
    with folder_written_aside(folder) as whole:
        aside = whole / "language"  # as large as the result, so on its disk, not on that of temporary files
        model.llm.save_pretrained(aside, dtype)
        for file in COPIED:
            if (source / file).is_file():
                shutil.copyfile(source / file, aside / file)
        end = [tokenizer.token(template.end)] if template.end in template.tokens else []
        stops = {"eos_token_id": list(dict.fromkeys([tokenizer.eos, *end, *AnswerSettings.from_folder(source).ends]))}
        write_text(aside / GENERATION, json.dumps(json_of(source / GENERATION) | stops))
        given = _own_template(template, tokenizer, aside) if chat_template is None else with_images(chat_template)
        written = write_llava(eye, Decoder.read(aside), whole, dtype, given)
        shutil.rmtree(aside)
    return [folder / path.name for path in written]


def _own_template(template: Template, tokenizer: LLMTokenizer, folder: Path) -> str:
    """The template of training in Jinja."""
    stock = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "" if tokenizer.bos is None else stock.id_to_token(tokenizer.bos) or ""
    added = bool(bos) and stock.encode("").ids[:1] == [tokenizer.bos]
    return jinja_of(template, "" if added else bos, stock.id_to_token(tokenizer.eos) or "")
