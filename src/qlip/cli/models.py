"""The model a command works with, on the machine there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlip import QLIPModel, QLIPProcessor
from qlip.assets import BUNDLED
from qlip.cli.console import usage_error
from qlip.cli.options import Dtype
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.archive.dataset.schema import DatasetInfo
    from qlip.archive.manage.decode import Need


@dataclass(frozen=True)
class Tokenizer:
    """A model with its processor, and the name that messages give it."""

    model: QLIPModel
    processor: QLIPProcessor
    name: str

    def described(self) -> dict[str, Any]:
        """What reports say of it."""
        return {
            "name": self.name,
            "code_fingerprint": self.model.code_fingerprint,
            "decoder_fingerprint": self.model.decoder_fingerprint,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def load(name: str, device: str = "auto", dtype: Dtype = Dtype.float32) -> Tokenizer:
    """Load a model in eval mode.

    Raises:
        UsageError: no such device.
        QLIPError: no such model, or a broken one.
    """
    where = pick_device(device)
    model = QLIPModel.from_pretrained(name, device=where, dtype=getattr(torch, dtype.value))
    return Tokenizer(model.eval(), QLIPProcessor.from_pretrained(name), BUNDLED if name == "bundled" else name)


def load_maker(
    info: DatasetInfo,
    where: str,
    name: str | None,
    need: Sequence[Need],
    device: str = "auto",
    dtype: Dtype = Dtype.float32,
) -> Tokenizer:
    """Load the model that made a dataset: the one named, else the one that the dataset names.

    Args:
        info, where: the dataset's, and its address.
        name: another name of it; None for the dataset's own.
        need: what for, see `qlip.archive.manage.decode.check_model`.

    Raises:
        UsageError: no such device.
        QLIPError: no such model, a broken one, or one that does not fit the dataset.
    """
    from qlip.archive.manage.decode import check_model

    try:
        tokenizer = load(info.model if name is None else name, device, dtype)
    except QLIPError as error:
        if name is not None:
            raise
        raise QLIPError(f"{error} (the dataset's model; --model gives another name for it)") from None
    check_model(info, where, tokenizer.model, tokenizer.processor, tokenizer.name, need)
    return tokenizer


def pick_device(name: str) -> torch.device:
    """A device by its name; "auto" is a GPU where there is one."""
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
    if name == "auto":
        return torch.device(present[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in present:
        usage_error(f"--device {name}: this machine has {', '.join(present)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        usage_error(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
