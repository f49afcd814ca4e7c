"""From what a source says about an image to the one caption that a step trains on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from qlip import assets
from qlip.data.sources.base import RawSample
from qlip.errors import QLIPError

TEMPLATES = ("cifar", "imagenet", "emoji", "sketch", "clothing")
"""Template lists in the package: CLIP's prompts (Radford et al., 2021), 18 for CIFAR and 80 for ImageNet; ours else."""


def load_templates(name: str) -> tuple[str, ...]:
    """Prompt templates of a packaged list (`TEMPLATES`) or of a text file, one a line, each with one ``{}``.

    Raises:
        QLIPError: neither a list of ours nor a file, or a line without ``{}``.
    """
    path = assets.path("templates", f"{name}.txt") if name in TEMPLATES else Path(name)
    if not path.is_file():
        raise QLIPError(f"templates {name!r}: neither a text file nor one of {', '.join(TEMPLATES)}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((line for line in lines if line.count("{}") != 1), None)
    if wrong is not None or not lines:
        raise QLIPError(f"templates {name!r}: the line {wrong or ''!r} should hold one '{{}}', where the label goes")
    return tuple(lines)


def draw_caption(sample: RawSample, templates: tuple[str, ...], rng: np.random.Generator) -> str | None:
    """One of the sample's captions; without any, its label in one of the templates; without these, None."""
    if sample.captions:
        return sample.captions[_draw(rng, len(sample.captions))]
    if sample.label is not None and templates:
        return templates[_draw(rng, len(templates))].replace("{}", sample.label)
    return None


def _draw(rng: np.random.Generator, count: int) -> int:
    return min(int(rng.random() * count), count - 1)  # random() only: its stream is the same in every numpy


def match_id(label: str | None, caption: str | None) -> int:
    """A number in [1, 2**63), equal where two captions mean the same (label, else text); 0 without one."""
    if caption is None:
        return 0
    text = f"label\0{label}" if label is not None else f"caption\0{caption}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return max(1, int.from_bytes(digest, "big") >> 1)
