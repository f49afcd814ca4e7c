"""How a vision-language model answers unless it is told otherwise: ``generation_config.json`` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from qlip.errors import validate_json
from qlip.lm.sampling import Sampling

FILE = "generation_config.json"


class AnswerSettings(BaseModel):
    """Settings of answers, under the names of transformers' GenerationConfig; its other keys are not followed.

    Attributes:
        do_sample: draw tokens; else the likeliest ones are taken, and the next four are not used.
        temperature, top_k, top_p, min_p: see :class:`qlip.lm.Sampling`; None is no filter.
        max_new_tokens: longest answer in tokens.
        eos_token_id: ids that end an answer, besides the tokenizer's and the template's.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    eos_token_id: int | list[int] | None = None

    def sampling(self, temperature: float | None = None) -> Sampling:
        """Sampling of answers, with another temperature where one is given.

        Raises:
            QLIPError: a temperature or filter out of range.
        """
        if temperature is None:
            temperature = (1.0 if self.temperature is None else self.temperature) if self.do_sample else 0.0
        if temperature == 0:
            return Sampling(temperature=0.0)
        return Sampling(
            temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
            self.min_p or 0.0,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the settings of a folder; the defaults if it has none.

        Raises:
            QLIPError: a broken file, or values of another type.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        return validate_json(cls, path.read_bytes(), str(path), remedy="fetch it again, or delete it")
