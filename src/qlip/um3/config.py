"""Configuration of a UM3: `UM3Config`, the text decoder's config.json with ``um3.json`` beside it.

The vocabulary is the text rows, then the visual rows; `begin_image` and `end_image` are text rows, so that the softmax
of each kind is over neighbouring rows (arXiv 2502.05178, eq. 6).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.lm.causal_config import CausalConfig, TokenId
from qlip.modeling.config import Config, Positive, model_type_of
from qlip.modeling.indices import MAX_GROUP_BITS

FILE = "um3.json"
"""File beside a stock decoder's config.json, by which a folder is recognised."""

Rows = Literal["shared", "per_group"]
Softmax = Literal["separate", "joint"]


class UM3Config(Config):
    """A text decoder whose ids are those of text, and behind them those of an image's groups.

    Attributes:
        decoder: sizes of the decoder; its `vocab_size` is the number of all rows.
        text_vocab_size: text rows, V_t, with those of `begin_image` and `end_image`.
        begin_image, end_image: ids before and behind the ids of an image.
        group_size: bits per group, G.
        num_groups: groups per token, K.
        grid: rows and columns of an image's tokens.
        rows: visual rows are "shared" by the groups of a token, or each group has its own ("per_group").
        softmax: of a prediction: "separate" is over the text rows or over the visual rows (eq. 6; per group with rows
            of its own), "joint" over all rows.
        vision_tower: QLIP of the tokens: a folder, a Hub id, a published model's name or "bundled".
        vision_fingerprint: code fingerprint of that QLIP; None takes any.
    """

    folder: ClassVar[str] = "the folder of a UM3"

    decoder: CausalConfig
    text_vocab_size: Positive
    begin_image: TokenId
    end_image: TokenId
    group_size: Annotated[int, Field(ge=1, lt=MAX_GROUP_BITS)]
    num_groups: Positive
    grid: tuple[Positive, Positive]
    rows: Rows = "shared"
    softmax: Softmax = "separate"
    vision_tower: str = "bundled"
    vision_fingerprint: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.begin_image == self.end_image or max(self.begin_image, self.end_image) >= self.text_vocab_size:
            raise ValueError(
                f"begin_image {self.begin_image} and end_image {self.end_image}: need two of the"
                f" {self.text_vocab_size:,} text rows"
            )
        if (wanted := self.text_vocab_size + self.visual_rows) != self.decoder.vocab_size:
            raise ValueError(
                f"{self.text_vocab_size:,} text rows and {self.visual_rows:,} visual ones are {wanted:,}, but the"
                f" decoder's vocab_size is {self.decoder.vocab_size:,}"
            )
        if self.image_length + 2 > self.decoder.length:
            raise ValueError(
                f"an image of {self.num_tokens:,} x {self.num_groups} ids with its begin and end does not fit in the"
                f" decoder's context of {self.decoder.length:,}"
            )
        return self

    @classmethod
    def extend(cls, text: CausalConfig, **fields: Any) -> Self:
        """Make the configuration of a text decoder with visual rows behind its own.

        Args:
            text: of the text decoder; its rows are the text rows, unless `text_vocab_size` adds some.
            **fields: attributes of this class, without `decoder`.

        Raises:
            QLIPError: fewer text rows than the text decoder has, or values that do not fit each other.
        """
        values = {"text_vocab_size": text.vocab_size} | fields
        if values["text_vocab_size"] < text.vocab_size:
            raise QLIPError(
                f"text_vocab_size {values['text_vocab_size']:,}: the text decoder has {text.vocab_size:,} rows; all"
                " are kept"
            )
        groups = values.get("num_groups", 1) if values.get("rows") == "per_group" else 1
        total = values["text_vocab_size"] + (groups << values.get("group_size", 1))
        return cls.from_dict(values | {"decoder": text.model_copy(update={"vocab_size": total})}, "UM3")

    @property
    def num_tokens(self) -> int:
        """Tokens per image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def image_length(self) -> int:
        """Ids per image, N K, without begin and end."""
        return self.num_tokens * self.num_groups

    @property
    def visual_rows(self) -> int:
        """Number of visual rows, V_v."""
        return (1 if self.rows == "shared" else self.num_groups) << self.group_size

    @property
    def visual_begin(self) -> int:
        """First visual id."""
        return self.text_vocab_size

    def group_rows(self, group: int) -> tuple[int, int]:
        """First id of a group's values, and the one behind its last."""
        begin = self.visual_begin + (group << self.group_size if self.rows == "per_group" else 0)
        return begin, begin + (1 << self.group_size)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the configuration of a folder.

        Raises:
            QLIPError: a file is absent or not JSON, or its values do not fit each other.
        """
        path = folder / FILE
        kind = model_type_of(folder)
        if str(kind).startswith("qlip") and not path.is_file():
            raise QLIPError(
                f"{folder}: is no UM3, its model_type is {kind!r}; `qlip chat` is for talkers, `qlip draw` for drawers"
            )
        decoder = CausalConfig.from_file(folder / "config.json")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QLIPError(
                f"{folder}: holds a text decoder, but no {FILE}; it is no UM3 yet: train one from it"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise QLIPError(f"{path}: not JSON ({error}); fetch the file again") from None
        if not isinstance(values, dict):
            raise QLIPError(f"{path}: not a JSON object; fetch the file again")
        return cls.from_dict(values | {"decoder": decoder}, str(path))

    def save(self, folder: Path) -> None:
        """Write ``um3.json``; the decoder writes its own config.json."""
        values = {name: one for name, one in self.to_dict().items() if name != "decoder"}
        write_text(folder / FILE, json.dumps(values, indent=2) + "\n")


def is_um3(folder: Path) -> bool:
    """Return True if a folder has the ``um3.json`` of a UM3."""
    return (folder / FILE).is_file()
