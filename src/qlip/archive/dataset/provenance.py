"""Input of a token dataset, ``source.json``: a run resumes only with the same input."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qlip.errors import QLIPError, validate_json

Kind = Literal["folder", "set", "tars", "parquet", "addresses"]


class SourceShard(BaseModel):
    """A shard in ``source.json``; the attributes are `InputShard`'s, images is its `count`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    images: int | None = Field(alias="pictures")
    digest: str


class SourceRecord(BaseModel):
    """Content of ``source.json``.

    Attributes:
        version: version of the format.
        kind: kind of the input.
        input: as it was given; another place with the same shards is the same input.
        options: options of reading: caption field, image column, shard size.
        shards: in order; shard n becomes part n.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    kind: Kind
    input: str
    options: dict[str, str | int | None]
    shards: tuple[SourceShard, ...]

    def to_json(self) -> str:
        """Return indented JSON."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> SourceRecord:
        """Read JSON. Raises QLIPError: not a source record, or of a newer version."""
        return validate_json(cls, data, where, remedy="take another output folder", of="datasets' sources")

    @classmethod
    def shards_in(cls, data: bytes) -> tuple[SourceShard, ...] | None:
        """Return the shards of a ``source.json``; None if it is not a tokenised input's, or cannot be read."""
        try:
            return cls.from_json(data, "source").shards
        except QLIPError:
            return None

    def difference(self, other: SourceRecord) -> str | None:
        """Return the first difference to another input as text, or None."""
        if self.kind != other.kind:
            return f"it was made of {KINDS[self.kind]}, not of {KINDS[other.kind]}"
        for name in self.options | other.options:
            if (value := self.options.get(name)) != other.options.get(name):
                return f"it was made with --{name.replace('_', '-')} {value}, not {other.options.get(name)}"
        if len(self.shards) != len(other.shards):
            return f"it was made of {len(self.shards):,} input shards, not of {len(other.shards):,}"
        for number, (one, two) in enumerate(zip(self.shards, other.shards, strict=True)):
            counted = None not in (one.images, two.images)  # an index may have been made since
            if (one.name, one.digest) != (two.name, two.digest) or (counted and one.images != two.images):
                what = f"{one.name!r}, not {two.name!r}" if one.name != two.name else f"another {one.name!r}"
                return f"input shard {number} was {what}"
        return None


KINDS = {
    "folder": "a folder",
    "set": "a public set",
    "tars": "tar files",
    "parquet": "Parquet files",
    "addresses": "a list of addresses",
}
