"""Read weights files: safetensors, state dicts of ``torch.save``, QLIP checkpoint folders. Only tensors are loaded."""

from __future__ import annotations

import re
import struct
import tarfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError
from qlip.modeling.checkpoint import PUBLISHED, Files
from qlip.modeling.config import QLIPConfig

WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training scripts nest the weights, in the order of the search."""

_PREFIXES = ("module.", "_orig_mod.")
_SPOILT = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, TypeError),
    *(ValueError, struct.error, tarfile.TarError),
)
"""Exceptions of the restricted reader on broken files, besides its own errors."""

_CHECKPOINTS = {"bundled", assets.BUNDLED, *PUBLISHED}


@dataclass(frozen=True)
class Source:
    """Tensors by name, their origin, and the file's other entries.

    Attributes:
        name: the file or folder as the caller named it.
        tensors: tensors by name, without the prefixes of wrappers.
        config: a QLIP checkpoint's; None for a file.
        folder: a QLIP checkpoint's; None for a file.
        others: entries that are not weights, with the reason why they are not read.
        beside: values of the entries beside the weights, such as a training script's options.
        unwrapped: description of how the tensors were nested; empty if they were not.
    """

    name: str
    tensors: dict[str, Tensor]
    config: QLIPConfig | None = None
    folder: Path | None = None
    others: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    unwrapped: str = ""


def read(name: str | Path, classes: Sequence[type] = ()) -> Source:
    """Read weights; only tensors are ever loaded, and objects of the given classes.

    Args:
        name: a ``.safetensors`` file, a file of ``torch.save``, or a QLIP checkpoint folder (also ``"bundled"`` and the
            published models' names).
        classes: classes of objects that a file of ``torch.save`` may hold; they must be harmless to build.

    Raises:
        QLIPError: no such file, a broken one, one that holds Python objects, or a folder without a QLIP checkpoint.
    """
    path = Path(name).expanduser()
    if path.is_dir() or str(name) in _CHECKPOINTS:
        return _checkpoint(str(name), path)
    if not path.is_file():
        raise QLIPError(f"{name}: no such file; give a .safetensors or .pt file, or a QLIP checkpoint folder")
    if path.suffix == ".safetensors":
        return Source(str(name), _safetensors(path))
    return _unwrapped(str(name), _torch_file(path, classes))


def _checkpoint(name: str, path: Path) -> Source:
    if path.is_dir() and not (path / "config.json").is_file():
        raise QLIPError(f"{name}: a folder without config.json is no QLIP checkpoint; name the weights file in it")
    files = Files(name)
    config = files.config()
    tensors: dict[str, Tensor] = {}
    for shard in files.weights():
        tensors |= _safetensors(shard)
    return Source(name, tensors, config, files.folder)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise QLIPError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def _torch_file(path: Path, classes: Sequence[type]) -> Any:
    try:  # the error below says in one line what is broken
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if found := re.search(r"(?:GLOBAL|global|class)\s+`?([A-Za-z_][\w.]*)", str(error)):
            raise QLIPError(
                f"{path}: holds Python objects ({found[1]}), which are never loaded; if you trust its origin, save"
                " the state dict alone as safetensors"
            ) from None
        why = "not a file of torch.save"
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise QLIPError(
                f"{path}: a TorchScript program, which is never run; save its state_dict() as safetensors first"
            ) from None
        why = "not a whole file of torch.save"
    except _SPOILT as error:
        why = f"not a whole file of torch.save: {type(error).__name__}"
    raise QLIPError(f"{path}: {why}; fetch it again")


def _unwrapped(name: str, loaded: Any) -> Source:
    """Remove the nesting and prefixes that training scripts add to a state dict."""
    path: list[str] = []
    others: dict[str, str] = {}
    beside: dict[str, Any] = {}
    while isinstance(loaded, Mapping):
        inner = next((key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        path.append(inner)
        for key in loaded:
            if key != inner:
                beside[str(key)] = loaded[key]
                others[".".join([*path[:-1], str(key)])] = f"beside the weights, which are under {'.'.join(path)!r}"
        loaded = loaded[inner]
    if not isinstance(loaded, Mapping):
        raise QLIPError(f"{name}: holds a {type(loaded).__name__}, not a state dict (tensors by name)")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    others |= {str(key): "not a tensor" for key, value in loaded.items() if not isinstance(value, Tensor)}
    how = [f"under {'.'.join(path)!r}"] if path else []
    while tensors and (prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        how.append(f"names without {prefix!r}")
    return Source(name, tensors, others=others, beside=beside, unwrapped=", ".join(how))
