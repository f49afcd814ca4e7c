"""Encode batches of pixels to rows of tokens and embeddings; `describe` makes the dataset's description first.

Shapes: B views of H x W pixels, N tokens each, E numbers in an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip.archive.dataset.entropy_coding import RowCoder
from qlip.archive.dataset.schema import OWN_COLUMNS, DatasetInfo, Views, arrow_schema
from qlip.archive.tokenize.crops import Normalizer, ViewMaker
from qlip.archive.tokenize.preprocess import POSITION, ReadyBatch, Work
from qlip.assets import BUNDLED, name_of
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, require
from qlip.modeling.checkpoint import Files
from qlip.modeling.fingerprint import text_fingerprint
from qlip.modeling.int8 import to_int8
from qlip.modeling.loading import LoadedModel
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import QLIPProcessor
from qlip.tokens import pack_batch
from qlip.tokens.entropy.tables import FILE, Tables

Dtype = Literal["float32", "bfloat16", "float16", "int8"]


def describe(
    model: str,
    views: Views,
    *,
    batch_size: int = 32,
    dtype: Dtype = "float32",
    device: str = "cpu",
    embeddings: bool = False,
    captions: bool = True,
    columns: Sequence[str] = (),
    key_column: str | None = None,
    entropy_code: bool = False,
    tables: Path | None = None,
    loaded: LoadedModel | None = None,
) -> Work:
    """Describe the work of tokenising with a model.

    Args:
        model: folder, Hub id or name; workers open it too.
        views: views of each image.
        batch_size, dtype, device: of the forward passes.
        embeddings: store the images' embeddings.
        captions: store captions and labels.
        columns: fields of the images' records to store as columns of text.
        key_column: field that is the key.
        entropy_code: store tokens entropy-coded.
        tables: of the entropy coder, by default the model's own.
        loaded: the model in float32, if the caller has it.

    Raises:
        QLIPError: no such model, a size that does not fit it, or no tables for its tokens.
    """
    folder = Path(model).expanduser()
    where = str(folder.absolute()) if folder.is_dir() else model
    tokenizer, processor = QLIPModel.from_pretrained(where), QLIPProcessor.from_pretrained(where)
    if views.fit == "tiles":
        views = views.model_copy(update={"tile": tokenizer.image_size})
    size = ViewMaker(processor.preprocessing, views).size
    grid = None if size is None else (size[0] // tokenizer.patch_size, size[1] // tokenizer.patch_size)
    coded = _read_tables(where, tables, tokenizer.num_bits) if entropy_code else None
    if taken := sorted({*columns} & OWN_COLUMNS):
        raise QLIPError(f"column {taken[0]!r}: a dataset has a column of this name; rename it in the input")
    info = DatasetInfo(
        model=name_of(model, BUNDLED),
        code_fingerprint=tokenizer.code_fingerprint,
        decoder_fingerprint=tokenizer.decoder_fingerprint,
        text_fingerprint=text_fingerprint(tokenizer, processor) if embeddings else None,
        bits_per_token=tokenizer.num_bits,
        group_size=tokenizer.group_size,
        grid=grid,
        views=views,
        preparation=processor.preprocessing.fingerprint(views.fit, views.size),
        embedding_dim=tokenizer.config.projection_dim if embeddings else None,
        captions=captions,
        columns=tuple(dict.fromkeys(columns)) or None,
        coding="raw" if coded is None else "entropy",
        table_hash=None if coded is None else Tables.from_bytes(coded, f"{model}: {FILE}").digest,
        batch_size=batch_size,
        dtype=dtype,
        device=torch.device(device).type,
    )
    return Work(info, where, processor.preprocessing, coded, key_column)


def _read_tables(model: str, given: Path | None, num_bits: int) -> bytes:
    path = given or Files(model).path(FILE)
    if path is None:
        raise QLIPError(f"{model}: has no {FILE}; make it with `qlip tokens codec train`, or do without entropy coding")
    data = Storage().read(str(path))
    if (found := Tables.from_bytes(data, str(path)).num_bits) != num_bits:
        raise QLIPError(f"{path}: for tokens of {found} bits, and the model's have {num_bits}; give its own tables")
    return data


class Encoder:
    """Model that encodes ready batches to tables with the dataset's columns and `POSITION`.

    Args:
        work: model and dataset.
        device: by default the dataset's kind of device.
        model: in float32, if the caller has it; it is moved and cast, and must not be used for anything else after.

    Raises:
        QLIPError: no such model, or it is not the one that the dataset was begun with.
    """

    def __init__(self, work: Work, device: str | None = None, model: QLIPModel | None = None) -> None:
        self.info, where = work.info, torch.device(device or work.info.device)
        model = QLIPModel.from_pretrained(work.model) if model is None else model
        _check_fingerprints(work, model)
        self.model = to_int8(model) if work.info.dtype == "int8" else model.to(getattr(torch, work.info.dtype))
        self.model = self.model.to(where)
        self._coder = None if work.tables is None else RowCoder(Tables.from_bytes(work.tables, FILE))
        self._normalize = Normalizer(work.preprocessing, where, self.model.dtype)

    def __call__(self, batch: ReadyBatch) -> Any:
        """Encode a batch; returns a table of B rows."""
        indices, embeddings = self.forward(self._normalize(batch.pixels))
        patch = self.model.patch_size
        grid = (batch.pixels.shape[1] // patch, batch.pixels.shape[2] // patch)
        tokens = pack_batch(indices.cpu(), self.model.group_size)
        if self._coder is not None:
            tokens = self._coder.encode(tokens, [grid] * len(tokens))
        return self._table(batch, tokens, grid, embeddings)

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, NDArray[np.float16] | None]:
        """Encode pixels in one forward pass.

        Returns:
            Indices, int64 (B, N, K), and embeddings, float16 (B, E), or None if they are not stored.
        """
        if self.info.embedding_dim is None:
            return self.model.encode(pixel_values), None
        output = self.model(pixel_values, reconstruct=False)
        assert output.image_embeds is not None
        return output.indices, output.image_embeds.cpu().numpy().astype(np.float16)

    def _table(
        self, batch: ReadyBatch, tokens: Sequence[bytes], grid: tuple[int, int], embeddings: NDArray[np.float16] | None
    ) -> Any:
        arrow = require("pyarrow", extra="tables")
        schema, rows = arrow_schema(self.info), batch.rows
        columns: dict[str, Any] = {
            "key": [row.key for row in rows],
            "view": [row.view for row in rows],
            "tokens": list(tokens),
            "grid": [list(grid)] * len(rows),
            "original_size": [list(row.original_size) for row in rows],
            "captions": [list(row.captions) for row in rows],
            "label": [row.label for row in rows],
        } | {name: [row.extra[place] for row in rows] for place, name in enumerate(self.info.columns or ())}
        made = [arrow.array(columns[name], schema.field(name).type) for name in schema.names if name != "embedding"]
        if embeddings is not None:
            made.append(arrow.FixedSizeListArray.from_arrays(arrow.array(embeddings.ravel()), embeddings.shape[1]))
        table = arrow.Table.from_arrays(made, schema=schema)
        return table.append_column(POSITION, arrow.array([row.position for row in rows], arrow.int64()))


def _check_fingerprints(work: Work, model: QLIPModel) -> None:
    for side in ("code", "decoder"):
        found, wanted = (cast(str, getattr(one, f"{side}_fingerprint")) for one in (model, work.info))
        if found != wanted:
            raise QLIPError(
                f"{work.model}: its {side} fingerprint is {found[:12]}, the dataset's {wanted[:12]}; put the model that"
                " the run began with there, on every machine"
            )
