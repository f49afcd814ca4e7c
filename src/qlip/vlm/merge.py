"""From a run to one folder: `merge` writes a model with its whole text decoder, adapters added."""

from __future__ import annotations

from pathlib import Path

import torch

from qlip import assets
from qlip.errors import QLIPError
from qlip.files import folder_written_aside
from qlip.lm.sampling import AnswerSettings
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.modeling.processor import QLIPProcessor
from qlip.vlm.config import is_vlm
from qlip.vlm.images import read_vlm_preprocessing
from qlip.vlm.model import VisionLanguageModel


def merge(run: str | Path, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a run with its whole text decoder.

    Args:
        run: folder of a run, of which the final model or the newest checkpoint is taken, of a checkpoint, or of a
            model.
        folder: created; its files are written whole or not at all.
        dtype: of the stored weights; their own by default.

    Returns:
        The folder that was taken.

    Raises:
        QLIPError: no vision-language model, or what `VisionLanguageModel.from_pretrained` refuses.
    """
    source = _model_of(run)
    model = VisionLanguageModel.from_pretrained(source)
    model.config = model.config.model_copy(update={"language_model": None, "language_fingerprint": None})
    with folder_written_aside(folder) as aside:
        model.save_pretrained(aside, dtype)
        LLMTokenizer.from_folder(source).save(aside)
        AnswerSettings.from_folder(source).save(aside)
        QLIPProcessor(read_vlm_preprocessing(source, model.config)).save_pretrained(aside)
    return source


def _model_of(run: str | Path) -> Path:
    place = resolve(assets.name_of(run, assets.BUNDLED_TALKER))
    found = [place / "model", *sorted(place.glob("checkpoints/step-*"), reverse=True), place]
    for one in found:
        if is_vlm(one):
            return one
    raise QLIPError(f"{run}: holds no vision-language model; give the folder of a run of the task vlm, or of its model")
