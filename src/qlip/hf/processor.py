"""Preparation of images and text by transformers' classes, from files that this package writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor

from qlip.hf.config import resolve_known


def load_processor(name_or_path: str | Path, **options: Any) -> CLIPProcessor:
    """Load image processor and tokenizer of a checkpoint; their pixels and ids equal those of `QLIPProcessor`.

    Args:
        name_or_path: a folder, a Hub id, or the name of the bundled or a published model.
        **options: of transformers' ``from_pretrained``.
    """
    place = resolve_known(name_or_path)
    return CLIPProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(place, **options),
        tokenizer=AutoTokenizer.from_pretrained(place, **options),
    )
