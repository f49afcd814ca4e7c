"""Package data, reachable by name: the bundled model, the published configs, demo images, prompt templates."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

BUNDLED = "qlip-nano-64"
"""Name of the model inside the wheel; ``from_pretrained("bundled")`` means the same."""


def path(*parts: str) -> Path:
    """Folder or file of the package data, e.g. ``path("configs", "QLIP-B-16-256.json")``; it may not exist."""
    return Path(str(resources.files(__name__))).joinpath(*parts)
