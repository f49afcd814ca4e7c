"""Text embeddings, computed once: a mean of prompts per class, and captions; cached in memory and, if many, on disk.

Shapes: C classes, T texts, E dimensions of the shared space.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qlip.data.public import cache_folder
from qlip.errors import QLIPError
from qlip.evaluation.models.base import EvalModel
from qlip.files import write_bytes
from qlip.modeling.model import unit
from qlip.runtime.finite import is_finite, require_finite

CLASSES_AT_ONCE = 32
TEXTS_AT_ONCE = 256
"""Prompts that go through the text tower together; always the same ones, so that vectors are the same to the bit."""
STORED_FROM = 2000
"""Texts; fewer are read again sooner than a file is looked for."""
KEPT = 8
_MEMORY: OrderedDict[str, Tensor] = OrderedDict()


@torch.inference_mode()
def classifier(model: EvalModel, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector a class: the mean over templates of the prompts' unit vectors, normalised again.

    CLIP's prompt ensemble (arXiv 2103.00020, section 3.1.4).

    Args:
        model: that can ``read``.
        names: C, as prompts say them.
        templates: strings with one ``{}`` each.

    Returns:
        (C, E) float32 on the CPU.
    """

    def block(some: Sequence[str]) -> Tensor:
        rows = []
        for name in some:
            prompts = [template.replace("{}", name) for template in templates]
            rows.append(_read(model, prompts).mean(0))
        return unit(torch.stack(rows))

    stored = len(names) * len(templates) >= STORED_FROM
    return _kept(model, {"templates": list(templates)}, names, CLASSES_AT_ONCE, block, stored)


@torch.inference_mode()
def text_vectors(model: EvalModel, texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts as they are.

    Args:
        model: that can ``read``.
        texts: T of them.

    Returns:
        (T, E) float32 on the CPU.
    """
    stored = len(texts) >= STORED_FROM
    return _kept(model, {}, texts, 8 * TEXTS_AT_ONCE, lambda some: _read(model, some), stored)


def _read(model: EvalModel, texts: Sequence[str]) -> Tensor:
    parts = [model.encode_text(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
    vectors = torch.cat(parts).float().cpu()
    named = [f"text {text[:80]!r}" for text in texts]
    require_finite(vectors, "embeddings", f"the output of {model.name} is broken", named)
    return vectors


def _kept(
    model: EvalModel,
    how: dict[str, object],
    texts: Sequence[str],
    at_once: int,
    compute: Callable[[Sequence[str]], Tensor],
    stored: bool,
) -> Tensor:
    """Rows for texts from memory, from disk block by block, or computed."""
    base = json.dumps({"subject": model.fingerprint, "device": model.device.type} | how, sort_keys=True)
    key = _key(base, texts)
    if key in _MEMORY:
        _MEMORY.move_to_end(key)
        return _MEMORY[key]
    stored = stored and model.cacheable
    blocks = [texts[i : i + at_once] for i in range(0, len(texts), at_once)]
    parts = [_block(_key(base, some), some, compute) if stored else compute(some) for some in blocks]
    found = _MEMORY[key] = torch.cat(parts)
    while len(_MEMORY) > KEPT:
        _MEMORY.popitem(last=False)
    return found


def _block(key: str, texts: Sequence[str], compute: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Read a block of rows from disk, or compute and store it: a killed evaluation continues there."""
    path = cache_folder() / "text_embeddings" / f"{key}.safetensors"
    stored = _stored(path)
    if stored is not None and len(stored) == len(texts) and is_finite(stored):
        return stored
    rows = compute(texts)
    with suppress(QLIPError):  # a cache that cannot be written costs time, nothing else
        write_bytes(path, save({"rows": rows.contiguous()}))
    return rows


def _stored(path: Path) -> Tensor | None:
    try:
        return load(path.read_bytes())["rows"]
    except (OSError, SafetensorError, KeyError):
        return None


def _key(base: str, texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([base, list(texts)]).encode()).hexdigest()
