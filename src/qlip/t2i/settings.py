"""How a drawer draws unless it is told otherwise: ``generation_config.json`` in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from qlip.files import write_text
from qlip.lm.guidance import Guidance, parse
from qlip.lm.sampling import Sampling
from qlip.modeling.config import Config

FILE = "generation_config.json"


class DrawSettings(Config):
    """Guidance and sampling that a decoder was tuned with, and the tokenizer whose tokens it draws.

    Attributes:
        guidance: scale or schedule, as :func:`qlip.lm.guidance.parse` reads it.
        temperature, top_k, top_p, min_p: see :class:`qlip.lm.Sampling`.
        tokenizer: a folder, a Hub id or "bundled": the QLIP that turns tokens into images. A folder inside the drawer's
            is named from there.
        classes: caption of each class that a decoder of captions was trained on, as {"cat": "a photo of a cat."}.
    """

    guidance: str = "1"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    tokenizer: str = "bundled"
    classes: dict[str, str] = {}

    @field_validator("guidance", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.schedule(), self.sampling()  # refuse what does not fit
        return self

    def schedule(self) -> Guidance:
        """Schedule of guidance."""
        return parse(self.guidance)

    def sampling(self, temperature: float | None = None, top_k: int | None = None) -> Sampling:
        """Temperature and filters, with other values where they are given."""
        return Sampling(
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else top_k,
            self.top_p,
            self.min_p,
        )

    def tokenizer_inside(self, folder: Path) -> Path | None:
        """Return the tokenizer's folder if it lies inside the drawer's folder, else None."""
        path = folder / self.tokenizer
        inside = (path / "config.json").is_file() and path.resolve().is_relative_to(folder.resolve())
        return path if inside else None

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the settings of a folder; the defaults if it has none.

        Raises:
            QLIPError: a file that is broken, or has unknown keys or values.
        """
        path = folder / FILE
        return cls.from_file(path) if path.is_file() else cls()

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(folder / FILE, json.dumps(self.to_dict(), indent=2) + "\n")
