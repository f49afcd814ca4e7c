"""Stage 2's use of stage 1's checkpoint: a model without its text side, and that side put back at the end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlip.data.sources.training_text import RECORD
from qlip.errors import QLIPError
from qlip.files import written_aside
from qlip.modeling import QLIPModel, checkpoint
from qlip.modeling.parts import TEXT_SIDE, Part, part_of, renew
from qlip.training.tasks.freezing import trained_in_stage2

PREPROCESSING = (
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    RECORD,
)
"""Files of a checkpoint that say how images and words reach the model, and which words trained it."""


def load_without_text(name_or_path: str | Path, fresh: Sequence[Part] = ()) -> QLIPModel:
    """A checkpoint's model whose text tower is neither read nor allocated.

    The checkpoint must be whole all the same: its text side goes into what stage 2 exports.

    Args:
        name_or_path: a folder, a Hub id, or ``"bundled"``.
        fresh: decoder, bottleneck or both, which get random weights; of the bottleneck, the sides that train.

    Returns:
        The model on the CPU in float32; its methods for images and tokens work, those for words do not.

    Raises:
        QLIPError: no such checkpoint, a tensor is missing, unexpected or of another shape, or a part that stage 2
            takes as it is should be fresh.
    """
    if taken := [part for part in fresh if part not in ("decoder", "bottleneck")]:
        raise QLIPError(f"model.fresh: stage 2 takes the {taken[0]} from stage 1 as it is; remove {taken[0]}")
    files = checkpoint.Files(name_or_path)
    model = checkpoint.load(QLIPModel, files, torch.float32, torch.device("cpu"), without=TEXT_SIDE)
    if fresh:
        moving = trained_in_stage2()
        renew(model, QLIPModel(model.config), lambda name: name.startswith(moving) and part_of(name) in fresh)
    return model


def export_whole(
    name_or_path: str | Path, weights: Mapping[str, Tensor], trained: frozenset[str], folder: Path
) -> None:
    """Write stage 1's checkpoint with other weights in the place of what stage 2 trained.

    What maps images and words to the shared space is copied bit by bit, as are preprocessing and vocabulary.

    Args:
        name_or_path: stage 1's checkpoint, the one that stage 2 started from.
        weights: whole tensors of the model without its text side, by name.
        trained: names of those that stage 2 moved.
        folder: where to.

    Raises:
        QLIPError: the checkpoint is no longer the one that stage 2 started from, or the folder cannot be written.
    """
    files = checkpoint.Files(name_or_path)
    with torch.device("meta"):
        model = QLIPModel(files.config())
    state = checkpoint.read(files, checkpoint.shapes_of(model))
    for name, tensor in weights.items():
        if name in trained:
            state[name] = tensor
        elif not torch.equal(state[name], tensor.cpu()):
            raise QLIPError(
                f"{name_or_path}: {name!r} is not what stage 2 started from; put the checkpoint of model.init back"
            )
    checkpoint.save(model, folder, None, state)
    for file in PREPROCESSING:
        if (source := files.path(file)) is not None:
            with written_aside(folder / file) as aside:
                shutil.copyfile(source, aside)
