"""Export of a UM3 as a stock decoder, with remote code and an example that mask, and its tokenizer of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from qlip.files import folder_written_aside, write_text
from qlip.hf.card import UM3_CARD, UM3_EXAMPLE
from qlip.hf.export import export_transformers
from qlip.hf.language import json_of, json_text
from qlip.hf.remote_code import um3_code
from qlip.lm.sampling import FILE as GENERATION
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.um3.model import UM3
from qlip.um3.session import UM3Settings

CODE, EXAMPLE, TOKENIZER = "modeling_um3.py", "draw_with_stock_transformers.py", "qlip"


def export_um3(
    name: str | Path, folder: Path, dtype: torch.dtype = torch.float32, vision_tower: str | None = None
) -> list[Path]:
    """Write a folder that plain transformers loads as a stock decoder, and with ``trust_remote_code=True`` as a UM3.

    Args:
        name: folder or Hub id of a UM3, with its tokenizer.
        folder: created; replaced only as a whole.
        dtype: data type of the stored weights.
        vision_tower: QLIP of its images, instead of the one that it names.

    Returns:
        The files.

    Raises:
        QLIPError: no such model, or a folder that cannot be written.
    """
    source = resolve(name)
    model, tokenizer = UM3.from_pretrained(source), LLMTokenizer.from_folder(source)
    config, sampling = model.config, UM3Settings.from_folder(source).sampling()
    kind = "UM3Qwen3" if config.decoder.qk_norm else "UM3Llama"
    stem = Path(CODE).stem
    with folder_written_aside(folder) as aside:
        model.save_pretrained(aside, dtype)
        tokenizer.save(aside)
        for file in ("special_tokens_map.json", "chat_template.jinja"):
            if (source / file).is_file():
                shutil.copyfile(source / file, aside / file)
        values = json_of(aside / "config.json")
        auto = ("AutoModelForCausalLM", "AutoModelForMultimodalLM")
        write_text(aside / "config.json", json_text(values | {"auto_map": dict.fromkeys(auto, f"{stem}.{kind}")}))
        settings = json_of(aside / "tokenizer_config.json")
        stock = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        write_text(aside / "tokenizer_config.json", json_text(settings | stock | {"padding_side": "left"}))
        processor = {
            "auto_map": {"AutoProcessor": f"{stem}.UM3Processor"},
            "processor_class": "UM3Processor",
            "image_length": config.image_length,
            "begin_image": config.begin_image,
            "end_image": config.end_image,
        }
        write_text(aside / "processor_config.json", json_text(processor))
        drawn = {
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature or 1.0,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "eos_token_id": tokenizer.eos,
            "pad_token_id": tokenizer.pad,
        }
        write_text(aside / GENERATION, json_text(json_of(source / GENERATION) | drawn))
        write_text(aside / CODE, um3_code())
        write_text(aside / EXAMPLE, UM3_EXAMPLE)
        write_text(aside / "README.md", UM3_CARD)
        export_transformers(vision_tower or config.vision_tower, aside / TOKENIZER)
        shutil.copyfile(aside / TOKENIZER / "preprocessor_config.json", aside / "preprocessor_config.json")
        written = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
    return [folder / name for name in written]
