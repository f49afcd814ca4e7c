"""Export of a tokenizer as a folder that plain transformers loads with ``trust_remote_code=True``."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qlip.files import folder_written_aside, write_text
from qlip.hf.card import CARD
from qlip.hf.model import QLIPHFModel
from qlip.hf.remote_code import FILE, remote_code
from qlip.modeling.processor import QLIPProcessor

AUTO_MAP = {
    "AutoConfig": "QLIPHFConfig",
    "AutoModel": "QLIPHFModel",
    "AutoModelForZeroShotImageClassification": "QLIPHFModel",
}
"""Class of the remote-code file by Auto class."""


def export_transformers(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write weights, configuration, remote code, and files of the processor and the tokenizer.

    Args:
        name: checkpoint folder, Hub id, or name of a model.
        folder: created; replaced only as a whole.
        dtype: data type of the stored weights.

    Returns:
        The files.

    Raises:
        QLIPError: no such model, or a folder that cannot be written.
    """
    with folder_written_aside(folder) as aside:
        QLIPHFModel.from_pretrained(name, dtype=dtype).save_pretrained(aside)
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {auto: f"{Path(FILE).stem}.{kind}" for auto, kind in AUTO_MAP.items()}
        write_text(aside / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_text(aside / FILE, remote_code())
        write_text(aside / "README.md", CARD)
        QLIPProcessor.from_pretrained(name).save_pretrained(aside)
        write_text(aside / "processor_config.json", json.dumps({"processor_class": "CLIPProcessor"}) + "\n")
        written = sorted(path.name for path in aside.iterdir())
    return [folder / name for name in written]
