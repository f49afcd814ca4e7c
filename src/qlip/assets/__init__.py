"""Package data, reachable by name: the bundled model, the published configs, demo images, prompt templates."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

BUNDLED = "qlip-nano-64"
"""Name of the model inside the wheel; ``from_pretrained("bundled")`` means the same."""
BUNDLED_DRAWER = "qlip-drawer-64"
"""Name of the decoder inside the wheel, which draws tokens of the bundled model from captions."""
BUNDLED_TALKER = "qlip-talker-64"
"""Name of the vision-language model inside the wheel, which answers questions about made scenes."""
BUNDLED_UM3 = "qlip-um3-64"
"""Name of the model of text and images inside the wheel, which describes made scenes and draws them."""
BUNDLED_DECODERS = (BUNDLED_DRAWER, BUNDLED_TALKER, BUNDLED_UM3)
"""Names of the models inside the wheel that use the bundled tokenizer."""

VERSION_1_CODES = "dd520695ad9207de5534e4ee3f50e0d773cc6471f3ee732272dc3638e1ee03fe"
"""Code fingerprint of the bundled model's version 1, which came with qlip 0.1; version 2 cannot read its tokens."""


def model_to_give(code_fingerprint: str) -> str:
    """Return the remedy of an error about tokens that another model made, by that model's code fingerprint."""
    if code_fingerprint == VERSION_1_CODES:
        return "encode the images again, or use qlip 0.1: its bundled model, version 1, made it"
    return "give the model that made it"


def name_of(name_or_path: str | Path, bundled: str) -> str:
    """Return the name of a model, for messages and cards; "bundled" stands for the package's model that is given."""
    return bundled if str(name_or_path) == "bundled" else str(name_or_path)


def path(*parts: str) -> Path:
    """Folder or file of the package data, e.g. ``path("configs", "QLIP-B-16-256.json")``; it may not exist."""
    return Path(str(resources.files(__name__))).joinpath(*parts)
