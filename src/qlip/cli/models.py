"""Models for commands: loaded by the options --model, --device and --dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlip.cli.console import usage_error
from qlip.cli.options import Dtype
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import torch

    from qlip.archive.dataset.schema import DatasetInfo
    from qlip.archive.manage.decode import Need
    from qlip.tokens import ImageCodec
    from qlip.vlm.chat import VisionChat


def load(name: str, device: str = "auto", dtype: Dtype = Dtype.float32) -> ImageCodec:
    """Load a model.

    Raises:
        UsageError: this machine has no such device.
        QLIPError: the model does not exist or is broken.
    """
    from qlip.tokens import ImageCodec

    return ImageCodec.from_pretrained(name, device=pick_device(device), dtype=dtype.value)


def load_for_dataset(
    info: DatasetInfo,
    where: str,
    name: str | None,
    need: Sequence[Need],
    device: str = "auto",
    dtype: Dtype = Dtype.float32,
) -> ImageCodec:
    """Load the model that made a dataset, from ``name`` or else from the name stored in the dataset.

    Args:
        info, where: the dataset's description and address.
        name: another name of the model; None for the stored one.
        need: purposes, see `qlip.archive.manage.decode.check_model`.

    Raises:
        UsageError: this machine has no such device.
        QLIPError: the model does not exist, is broken, or did not make the dataset.
    """
    from qlip.archive.manage.decode import check_model

    try:
        codec = load(info.model if name is None else name, device, dtype)
    except QLIPError as error:
        if name is not None:
            raise
        raise QLIPError(f"{error} (the dataset's model; --model gives another name for it)") from None
    check_model(info, where, codec.model, codec.processor, codec.name, need)
    return codec


def load_talker(name: str, device: str = "auto", dtype: Dtype = Dtype.float32) -> VisionChat:
    """Load a vision-language model.

    Raises:
        UsageError: this machine has no such device.
        QLIPError: the model does not exist or is broken.
    """
    from qlip.vlm.chat import VisionChat

    return VisionChat.from_pretrained(name, device=pick_device(device), dtype=dtype.value)


def pick_device(name: str) -> torch.device:
    """Return the device of --device.

    Raises:
        UsageError: this machine has no such device.
    """
    from qlip.modeling import loading

    try:
        return loading.pick_device(name)
    except QLIPError as error:
        usage_error(f"--{error}")
