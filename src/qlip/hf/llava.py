"""Export of a LLaVA: QLIP's encoder, a projector and a text decoder in one folder that stock transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.files import folder_written_aside, write_text
from qlip.hf.card import llava_card
from qlip.hf.chat_template import with_images
from qlip.hf.config import QLIPHFVisionConfig
from qlip.hf.language import Decoder, json_of, json_text
from qlip.hf.remote_code import FILE, remote_code
from qlip.modeling.checkpoint import resolve, save_weights
from qlip.modeling.config import QLIPVisionConfig
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.vlm.conversations import IMAGE

AUTO_MAP = {"AutoConfig": "QLIPHFLlavaConfig", "AutoModelForImageTextToText": "QLIPHFLlava"}
"""Class of the remote-code file by Auto class."""


@dataclass(frozen=True)
class Eye:
    """The parts that see.

    Attributes:
        config: of the tower.
        preprocessing: of images.
        tower: the encoder's weights by name.
        projector: linear, GELU, linear, from the tower's width to the decoder's; None for a new one.
        layer: hidden state that the projector reads.
        pad: images are made square by margins of the mean colour.
    """

    config: QLIPVisionConfig
    preprocessing: Preprocessing
    tower: dict[str, Tensor]
    projector: nn.Sequential | None = None
    layer: int = -2
    pad: bool = False


def export_llava(
    name: str,
    language: str | Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write a LLaVA of a QLIP and a text decoder, with a new projector, which must be trained.

    Args:
        name: checkpoint folder, Hub id, or name of a QLIP.
        language: folder or Hub id of a text decoder: config.json, safetensors, tokenizer.json.
        folder: created; replaced only as a whole.
        dtype: data type of the stored weights.
        chat_template: Jinja template of turns; the decoder's own by default.
        seed: of the projector's weights.

    Returns:
        The files.

    Raises:
        QLIPError: no such model, a decoder that stock LLaVA cannot hold, or a folder that cannot be written.
    """
    model = QLIPModel.from_pretrained(name)
    processor = QLIPProcessor.from_pretrained(name)
    eye = Eye(model.config.vision_config, processor.preprocessing, model.vision_model.state_dict())
    decoder = Decoder.read(resolve(language))
    template = with_images(decoder.chat_template() if chat_template is None else chat_template)
    return write_llava(eye, decoder, folder, dtype, template, seed)


def write_llava(
    eye: Eye, decoder: Decoder, folder: Path, dtype: torch.dtype, template: str | None, seed: int = 0
) -> list[Path]:
    """Write the folder; see :func:`export_llava`. The template takes turns with images."""
    vision = eye.config
    tokens = (eye.preprocessing.size[0] // vision.patch_size) * (eye.preprocessing.size[1] // vision.patch_size)
    width = int(decoder.config.hidden_size)
    projector = eye.projector or _new_projector(vision.hidden_size, width, seed)
    tower = QLIPHFVisionConfig(**vision.to_dict()).to_diff_dict()
    tower.pop("transformers_version", None)
    kind = str(dtype).removeprefix("torch.")
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "auto_map": {auto: f"{Path(FILE).stem}.{name}" for auto, name in AUTO_MAP.items()},
        "dtype": kind,
        "image_seq_length": tokens,
        "image_token_index": decoder.image_id,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": decoder.text_config() | {"dtype": kind},
        "tie_word_embeddings": decoder.tied,
        "torch_dtype": kind,
        "vision_config": tower,
        "vision_feature_layer": eye.layer,
        "vision_feature_select_strategy": "default",
    }
    seeing = {f"model.vision_tower.vision_model.{name}": tensor for name, tensor in eye.tower.items()}
    for ours, stock in (("0", "linear_1"), ("2", "linear_2")):
        linear = projector.get_submodule(ours).state_dict()
        seeing |= {f"model.multi_modal_projector.{stock}.{name}": tensor for name, tensor in linear.items()}
    texts = {
        "config.json": json_text(config),
        "processor_config.json": json_text(
            {
                "image_token": IMAGE,
                "num_additional_image_tokens": 1,  # [CLS], which the strategy "default" leaves out again
                "patch_size": vision.patch_size,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            }
        ),
        "tokenizer_config.json": json_text(_tokenizer_config(decoder)),
        "generation_config.json": json_text(_generation(decoder)),
        FILE: remote_code(llava=True),
        "README.md": llava_card(template is not None, new_projector=eye.projector is None, seed=seed),
    }
    with folder_written_aside(folder) as aside:
        _write_weights(aside, decoder, seeing, dtype)
        for name, text in texts.items():
            write_text(aside / name, text)
        if template is not None:
            write_text(aside / "chat_template.jinja", template)
        decoder.tokenizer.save(str(aside / "tokenizer.json"))
        QLIPProcessor(eye.preprocessing, None).save_pretrained(aside)
        if eye.pad:
            file = aside / "preprocessor_config.json"
            write_text(file, json_text(json_of(file) | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}))
        written = sorted(path.name for path in aside.iterdir())
    return [folder / name for name in written]


def _new_projector(size_in: int, width: int, seed: int) -> nn.Sequential:
    """Random projector; the generator of the process stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(size_in, width), nn.GELU(), nn.Linear(width, width))


def _write_weights(aside: Path, decoder: Decoder, seeing: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write the tensors: the decoder's as in its files, and the tower and projector in the last one."""
    total, sizes = len(decoder.files()) + 1, 0
    where: dict[str, str] = {}
    for number, tensors in enumerate([*decoder.tensors(), seeing], 1):
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        save_weights(tensors, aside, dtype, name)
        where |= dict.fromkeys(tensors, name)
        sizes += sum(one.numel() for one in tensors.values()) * dtype.itemsize
    index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(where.items()))}
    write_text(aside / "model.safetensors.index.json", json_text(index))


def _tokenizer_config(decoder: Decoder) -> dict[str, Any]:
    """``tokenizer_config.json`` in the form that transformers 4.57 and 5 read."""
    roles = decoder.special_tokens()
    return roles | {
        "additional_special_tokens": [IMAGE],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(getattr(decoder.config, "max_position_embeddings", None) or 2048),
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _generation(decoder: Decoder) -> dict[str, Any]:
    """``generation_config.json``: the decoder's, or its special ids."""
    found = json_of(decoder.folder / "generation_config.json")
    found.pop("transformers_version", None)
    for role, token in decoder.special_tokens().items():
        if role != "unk_token" and found.get(f"{role}_id") is None:
            found[f"{role}_id"] = decoder.tokenizer.token_to_id(token)
    return found
