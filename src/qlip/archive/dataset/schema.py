"""Description of a token dataset, `DatasetInfo`, and the columns of its Parquet files (docs/tokens.md).

Shapes: N tokens of L bits in a grid of height x width; E numbers in an embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qlip.errors import QLIPError, require, validate_json
from qlip.tokens.image_codec import tiles_of
from qlip.tokens.packing import MAX_BITS, packed_size

VERSION: Final = 1
METADATA_KEY = b"qlip"
"""Key of the Parquet files' schema metadata that holds a :class:`DatasetInfo` as JSON."""

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=2**16 - 1)]
Coding = Literal["raw", "entropy"]


OWN_COLUMNS = frozenset("key view tokens grid original_size captions label embedding position".split())
"""Names that no further column may have."""


class Views(BaseModel):
    """Views of an image that are encoded; each is a row of the dataset.

    Attributes:
        fit: ``square`` is the model's own preprocessing (resize, centre crop); ``keep-aspect`` keeps the proportions,
            so that grids differ from image to image; ``tiles`` cuts the image into tiles of the model's size, each a
            row whose view is its number in raster order.
        size: height and width in pixels, if not the model's; for ``tiles``, if not the image's.
        crops: ``one``; ``flip``, the image and its mirror image; ``ten``, the corners and the centre of the image
            at `crop_range` times the size, and their mirror images (as LlamaGen, arXiv 2406.06525, trains).
        crop_range: scale of the image for ``ten``.
        tile: height and width of a tile in pixels, with ``tiles``; else None, and left out of the JSON.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fit: Literal["square", "keep-aspect", "tiles"] = "square"
    size: tuple[Side, Side] | None = None
    crops: Literal["one", "flip", "ten"] = "one"
    crop_range: Annotated[float, Field(ge=1, le=4)] = 1.1
    tile: Side | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fit == "keep-aspect" and self.crops == "ten":
            raise ValueError("ten crops are cut from a square image; take fit: square")
        if self.fit == "tiles" and self.crops != "one":
            raise ValueError("tiles are neither cropped nor mirrored; take crops: one")
        if self.fit != "tiles" and self.tile is not None:
            raise ValueError("tile goes with fit: tiles, and only with it")
        return self

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the key that only datasets of tiles have."""
        return _without_none(handler(self), "tile")

    @property
    def count(self) -> int | None:
        """Rows per image; None of tiles, where it differs from image to image."""
        return None if self.fit == "tiles" else {"one": 1, "flip": 2, "ten": 10}[self.crops]

    @property
    def first_mirrored(self) -> int | None:
        """Number of the first mirrored view, the mirror image of view 0; the next is that of view 1. None of tiles.

        A number beyond `count` can only come from merged datasets of other views, and may be a mirror image.
        """
        return None if self.count is None else max(1, self.count // 2)

    def tiles_of(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the tiles of an image of (width, height) pixels."""
        if self.tile is None:
            raise QLIPError(f"views of fit {self.fit} have no tiles; only those of fit tiles with a tile's size do")
        return tiles_of(original_size, self.tile, self.size)

    def count_of(self, original_size: tuple[int, int]) -> int:
        """Return the number of rows of an image of (width, height) pixels."""
        return math.prod(self.tiles_of(original_size)) if self.count is None else self.count

    @property
    def description(self) -> str:
        """The views in a few words."""
        if self.fit != "tiles":
            return f"{self.crops}, {self.fit}"
        size = "" if self.size is None else f", together near {self.size[0]} x {self.size[1]}"
        return f"tiles of {self.tile} x {self.tile}{size}"


class DatasetInfo(BaseModel):
    """Description of a dataset, stored in ``dataset.json`` and in each Parquet file's metadata.

    Datasets of one `code_fingerprint` (and of equal bits, embeddings and coding) may be merged.

    Attributes:
        version: of the format.
        model: name of the model as it was given.
        code_fingerprint, decoder_fingerprint: of the model, as in `.qlip` files.
        text_fingerprint: of the weights that make embeddings besides the code's; None without embeddings.
        bits_per_token: L.
        group_size: bits per group of the model; readers may take any divisor of L.
        grid: (height, width) in tokens where one grid rules the dataset, else None.
        views: views of each image.
        embedding_dim: E, or None without embeddings.
        preparation: 16 hex digits that identify how the images were resized and normalised before their views were
            cut or mirrored (`Preprocessing.fingerprint` of the fit and the size), as in `.qlip` files; crops are said
            by `views` alone. None if that is not known, as in datasets made before this was written, or if it differs
            from row to row; then the key is left out of the JSON.
        captions: whether captions and labels are kept.
        columns: names of further columns, text from the images' records; None, and left out of the JSON, if there are
            none.
        coding: ``raw``, packed bits; or ``entropy``, coded by the tables whose hash is `table_hash`.
        table_hash: SHA-256 of the entropy coder's tables, 64 hex digits, which lie in the dataset's folder.
        batch_size, dtype, device: of the forward passes; floats, and so rarely a bit, depend on them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = VERSION
    model: str
    code_fingerprint: Fingerprint
    decoder_fingerprint: Fingerprint
    text_fingerprint: Fingerprint | None = None
    bits_per_token: Annotated[int, Field(ge=1, le=MAX_BITS)]
    group_size: Annotated[int, Field(ge=1, le=MAX_BITS)]
    grid: tuple[Side, Side] | None
    views: Views = Views()
    preparation: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    embedding_dim: Annotated[int, Field(ge=1)] | None = None
    captions: bool = True
    columns: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    coding: Coding = "raw"
    table_hash: Fingerprint | None = None
    batch_size: Annotated[int, Field(ge=1)]
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    device: str = "cpu"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bits_per_token % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {self.bits_per_token} bits")
        if (self.coding == "entropy") != (self.table_hash is not None):
            raise ValueError("table_hash goes with coding: entropy, and only with it")
        if (self.embedding_dim is None) != (self.text_fingerprint is None):
            raise ValueError("text_fingerprint goes with embeddings, and only with them")
        if (names := self.columns) is not None and (len(set(names)) != len(names) or set(names) & OWN_COLUMNS):
            raise ValueError(f"columns {', '.join(names)}: each once, and none of {', '.join(sorted(OWN_COLUMNS))}")
        if self.views.fit == "tiles" and (self.views.tile is None or self.grid is None):
            raise ValueError("views of tiles need the size of a tile, and tiles have one grid")
        return self

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that datasets of version 0.1 do not have, so that theirs stay equal byte by byte."""
        return _without_none(handler(self), "preparation", "columns")

    @property
    def token_bytes(self) -> int | None:
        """Bytes of a row's tokens if all rows have the same number (raw coding, one grid); else None."""
        if self.grid is None or self.coding != "raw":
            return None
        return packed_size(self.grid[0] * self.grid[1], self.bits_per_token)

    def to_json(self) -> str:
        """Return JSON on one line with sorted keys: equal infos are equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> DatasetInfo:
        """Read JSON. Raises QLIPError: no JSON, an unknown or missing key, or a newer version."""
        return validate_json(cls, text, where, remedy="copy the dataset again", of="token datasets")


def _without_none(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None or name not in names}


MUST_AGREE = ("code_fingerprint", "bits_per_token", "embedding_dim", "text_fingerprint", "coding", "table_hash")
"""Fields that are equal in all parts of a dataset. Rows of other batch sizes, names or decoders may stand together."""


def first_difference(one: DatasetInfo, other: DatasetInfo) -> str | None:
    """Return the first field of `MUST_AGREE` that differs."""
    return next((name for name in MUST_AGREE if getattr(one, name) != getattr(other, name)), None)


def arrow_schema(info: DatasetInfo) -> Any:
    """Return the pyarrow schema of a dataset's Parquet files.

    ``key`` string; ``view`` uint8, which of the image's views, or uint16, number of the tile; ``tokens``, packed as
    `qlip.tokens.pack` does, fixed-size binary where all have one size, else binary; ``grid`` uint16[2], height and
    width in tokens; ``original_size`` uint32[2], the image's width and height in pixels; with captions ``captions``
    list of string and ``label`` string; each of ``columns`` as string; with embeddings ``embedding`` float16[E], unit
    length.

    Args:
        info: stored in the metadata, under ``qlip``.
    """
    arrow = require("pyarrow", extra="tables")
    size = info.token_bytes
    fields = [
        arrow.field("key", arrow.string(), nullable=False),
        arrow.field("view", arrow.uint16() if info.views.fit == "tiles" else arrow.uint8(), nullable=False),
        arrow.field("tokens", arrow.binary() if size is None else arrow.binary(size), nullable=False),
        arrow.field("grid", arrow.list_(arrow.uint16(), 2), nullable=False),
        arrow.field("original_size", arrow.list_(arrow.uint32(), 2), nullable=False),
    ]
    if info.captions:
        fields += [arrow.field("captions", arrow.list_(arrow.string())), arrow.field("label", arrow.string())]
    fields += [arrow.field(name, arrow.string()) for name in info.columns or ()]
    if info.embedding_dim is not None:
        fields.append(arrow.field("embedding", arrow.list_(arrow.float16(), info.embedding_dim)))
    return arrow.schema(fields, metadata={METADATA_KEY: info.to_json().encode()})


def info_of(metadata: Mapping[bytes, bytes] | None, where: str) -> DatasetInfo:
    """Read the info from a Parquet file's schema metadata.

    Raises:
        QLIPError: the file holds none, so it is no part of a token dataset.
    """
    if not metadata or METADATA_KEY not in metadata:
        raise QLIPError(f"{where}: no part of a token dataset; give a folder that `qlip tokenize` wrote")
    return DatasetInfo.from_json(metadata[METADATA_KEY], where)
