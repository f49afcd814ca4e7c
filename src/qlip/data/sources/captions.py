"""The caption that a training step uses: drawn from a sample's captions, or made of its label by a template.

A caption that names a side, such as "a cup to the left of a plate", is false for the mirror image (`names_side`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qlip import assets
from qlip.data.sources.base import RawSample
from qlip.errors import QLIPError
from qlip.files import read_lines

TEMPLATES = ("cifar", "imagenet", "emoji", "sketch", "clothing")
"""Template lists in the package: CLIP's 18 for CIFAR and 80 for ImageNet (Radford et al., 2021), the others ours."""
_SIDES = re.compile(
    "(?<![a-z])(?:(?:left|right)(?:most|wards?|hand|handed)?|(?:anti|counter)?-?clockwise"
    "|(?:north|south)?-?(?:east|west)(?:wards?|ern|erly)?|starboard)(?![a-z])",
    re.IGNORECASE,
)


def load_templates(name: str) -> tuple[str, ...]:
    """Read the prompt templates of a packaged list (`TEMPLATES`) or a text file, one per line, each with one ``{}``.

    Raises:
        QLIPError: neither a packaged list nor a file, or a line without ``{}``.
    """
    path = assets.path("templates", f"{name}.txt") if name in TEMPLATES else Path(name)
    if not path.is_file():
        raise QLIPError(f"templates {name!r}: neither a text file nor one of {', '.join(TEMPLATES)}")
    lines = [text for line in read_lines(path) if (text := line.strip())]
    wrong = next((line for line in lines if line.count("{}") != 1), None)
    if wrong is not None or not lines:
        raise QLIPError(f"templates {name!r}: the line {wrong or ''!r} should hold one '{{}}', the place of the label")
    return tuple(lines)


def draw_caption(sample: RawSample, templates: tuple[str, ...], rng: np.random.Generator) -> str | None:
    """A random caption of the sample; without captions, its label in a random template; without either, None."""
    if sample.captions:
        return sample.captions[_draw(rng, len(sample.captions))]
    if sample.label is not None and templates:
        return templates[_draw(rng, len(templates))].replace("{}", sample.label)
    return None


def first_sentence(caption: str) -> str:
    """Return a caption up to its first full stop; without one, or with nothing before it, the whole caption."""
    first, stop, _ = (caption + " ").partition(". ")
    return f"{first}." if stop and first.strip() else caption


def names_side(text: str) -> bool:
    """Return whether a text names a side, so that it may be false for the mirror image.

    English words alone: left, right, their compounds such as leftmost and right-hand, (counter-)clockwise, east, west
    and what is made of them, and starboard. Text inside an image, which a mirror makes unreadable, cannot be known.
    """
    return _SIDES.search(text) is not None


def without_sides(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that are true of the mirror image too."""
    return tuple(text for text in texts if not names_side(text))


def _draw(rng: np.random.Generator, count: int) -> int:
    return min(int(rng.random() * count), count - 1)  # random() alone, whose stream is equal in all numpy versions


def match_id(label: str | None, caption: str | None) -> int:
    """A number in [1, 2**63) that is equal for equal labels, else for equal texts; 0 without a caption."""
    if caption is None:
        return 0
    text = f"label\0{label}" if label is not None else f"caption\0{caption}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return max(1, int.from_bytes(digest, "big") >> 1)
