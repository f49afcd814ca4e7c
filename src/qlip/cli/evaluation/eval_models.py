"""Models that `qlip eval` measures: a QLIP, an adapter of another model, or pairs of files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlip.cli.console import usage_error
from qlip.cli.options import Dtype

if TYPE_CHECKING:
    from qlip.data.sources.base import CaptionedImages
    from qlip.evaluation.models.base import EvalModel

OpenImages = Callable[[str], "CaptionedImages"]
"""Opens a set by its name."""


def model(name: str, device: str, dtype: Dtype, size: tuple[int, int] | None) -> tuple[EvalModel, OpenImages]:
    """Open a QLIP, or an adapter such as `diffusers.AutoencoderKL:FOLDER` or `module:callable`; and any set."""
    from qlip.cli import models
    from qlip.data.sources.training_text import TrainingText
    from qlip.evaluation.models.adapters import open_model
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.run.datasets import open_set

    open_images = cache(open_set)  # used by the progress bar, the passes and the report
    if ":" in name and not Path(name).exists():
        if dtype != Dtype.float32:
            usage_error("an adapter chooses the data type of its weights; leave out --dtype")
        return open_model(name, size=size, device=models.pick_device(device)), open_images
    codec = models.load(name, device, dtype)
    text = TrainingText.read(name)
    return QLIPEvalModel(codec.model, codec.processor, codec.name, size, training_text=text), open_images


def pairs(path: Path) -> tuple[EvalModel, OpenImages]:
    """Open pairs of files named by a list, with that list as the only set."""
    from qlip.errors import QLIPError
    from qlip.evaluation.models.pairs import open_pairs

    model, source = open_pairs(path)

    def open_list(name: str) -> CaptionedImages:
        if name != source.name:
            raise QLIPError(f"{name}: is not the list of pairs that was given, {source.name}")
        return source

    return model, open_list


def own_device(device: str) -> str:
    """Return this process's GPU if torchrun started several processes and no device was named."""
    import torch

    from qlip.runtime.ranks import local_rank, world_size

    own = device == "auto" and world_size() > 1 and torch.cuda.is_available()
    return f"cuda:{local_rank()}" if own else device
