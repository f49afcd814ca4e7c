"""Checkpoints of diffusers and transformers: loaded from safetensors alone, with their config and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qlip.errors import QLIPError


def load(library: ModuleType, kind: str, where: str, **options: Any) -> nn.Module:
    """Load a checkpoint of a library, all of its weights, in eval mode.

    Args:
        library: diffusers or transformers.
        kind: name of its class.
        where: folder or Hub id.
        **options: further ones of its ``from_pretrained``.

    Raises:
        QLIPError: no such class, no safetensors, or weights that are missing.
    """
    make: Any = getattr(library, kind, None)
    if not hasattr(make, "from_pretrained"):
        raise QLIPError(
            f"{library.__name__}.{kind}: {library.__name__} has no such model; class names are as in its documentation"
        )
    bars: Any = library.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        found, info = make.from_pretrained(where, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # a checkpoint that is not as it should be
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise QLIPError(f"{where}: {kind} cannot be read as safetensors ({first[:200]})") from None
    finally:
        if shown:
            bars.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise QLIPError(f"{where}: has no weights for {len(missing)} tensors of a {kind}, such as {missing[0]}")
    model: nn.Module = found
    return model.eval()


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a model of either library."""
    config: Any = getattr(model, "config", {})
    found: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return found


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 (hex) of a model's class, config and weights."""
    settings = {key: value for key, value in config_of(model).items() if not key.startswith("_")}
    for version in ("transformers_version", "torch_dtype", "dtype"):
        settings.pop(version, None)
    digest = hashlib.sha256(f"{type(model).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    add_weights(digest, model)
    return digest.hexdigest()


def add_weights(digest: hashlib._Hash, model: nn.Module) -> None:
    """Add names, shapes and values of a model's weights to a digest."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
