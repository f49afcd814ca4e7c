"""What `qlip eval` measures: a model, or what somebody else made."""

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

Opened = Callable[[str], "CaptionedImages"]
"""A set's images by its name."""


def model(name: str, device: str, dtype: Dtype, size: tuple[int, int] | None) -> tuple[EvalModel, Opened]:
    """A QLIP, or what an adapter opens: `diffusers.AutoencoderKL:FOLDER`, `module:callable`; and any set."""
    from qlip.cli import models
    from qlip.evaluation.models.adapters import open_model
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.run.datasets import open_set

    opened = cache(open_set)  # for the bar, the passes, and the page
    if ":" in name and not Path(name).exists():
        if dtype != Dtype.float32:
            usage_error("an adapter's weights are of the type that it opens them in; leave out --dtype")
        return open_model(name, size=size, device=models.pick_device(device)), opened
    tokenizer = models.load(name, device, dtype)
    return QLIPEvalModel(tokenizer.model, tokenizer.processor, tokenizer.name, size), opened


def pairs(path: Path) -> tuple[EvalModel, Opened]:
    """Files that a list names, and that list as the only set."""
    from qlip.errors import QLIPError
    from qlip.evaluation.models.pairs import open_pairs

    model, source = open_pairs(path)

    def only(name: str) -> CaptionedImages:
        if name != source.name:
            raise QLIPError(f"{name}: is not the list of pairs that was given, {source.name}")
        return source

    return model, only


def own_device(device: str) -> str:
    """This process's GPU where torchrun started several and none was named."""
    import torch

    from qlip.runtime.ranks import local_rank, world_size

    shared = device == "auto" and world_size() > 1 and torch.cuda.is_available()
    return f"cuda:{local_rank()}" if shared else device
