"""`qlip embed`: embeddings of images and texts in one space."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, io_pipeline, options
from qlip.cli.console import Failures, plural, print_json, progress, show, stoppable, usage_error
from qlip.errors import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.tokens import ImageCodec

SUFFIXES = (".npy", ".parquet")


def embed(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE...]", help="Image files, folders (with subfolders) or patterns such as 'photos/*.jpg'."
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Text to embed. May be repeated.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File for the embeddings. .npy: a float32 array (rows, width); .parquet: columns kind, input, "
            "embedding.",
        ),
    ] = Path("embeddings.npy"),
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Embed images and texts as unit vectors, whose dot product is their cosine similarity.

    Rows are the images in order, then the texts in order. An image that cannot be read has no row; --json lists the
    input of each row.
    """
    if not images and not text:
        usage_error("nothing to embed: give images, --text TEXT, or both")
    if output.suffix not in SUFFIXES:
        usage_error(f"{output}: must end in {' or '.join(SUFFIXES)}")
    if output.suffix == ".parquet":
        require("pyarrow", extra="tables")
    from qlip.cli import models
    from qlip.data.sources.base import printable
    from qlip.files import write_bytes

    found = inputs.find(images or [], inputs.IMAGES, "image")
    codec, failures = models.load(model, device, dtype), Failures()
    with stoppable("nothing was written"):
        vectors = embed_images(codec, found, batch_size, failures)
        rows = [("image", printable(str(item.path)), vectors[item]) for item in found if item in vectors]
        if text:
            rows += [("text", line, vector) for line, vector in zip(text, codec.embed_texts(text), strict=True)]
        if rows:
            write_bytes(output, _npy(rows) if output.suffix == ".npy" else _parquet(rows))
    if as_json:
        listed = [{"row": i, "kind": kind, "input": name} for i, (kind, name, _) in enumerate(rows)]
        width = codec.model.config.projection_dim
        print_json(
            {
                "model": codec.described(),
                "output": str(output) if rows else None,
                "shape": [len(rows), width],
                "results": listed,
                "failures": failures.found,
            }
        )
    elif rows:
        show(f"{plural(len(rows), 'vector')} of {len(rows[0][2])} values in {output}")
    failures.finish(len(found), "image")


def embed_images(
    codec: ImageCodec, found: Sequence[inputs.Input], batch_size: int, failures: Failures
) -> dict[inputs.Input, NDArray[np.float32]]:
    """Return the unit vector of each image that can be read."""
    vectors = {}
    with progress("embedding", len(found)) as bar:
        stream = io_pipeline.read_ahead(found, lambda item: codec.prepare(item.path), failures)
        for batch in io_pipeline.in_batches(stream, batch_size, lambda loaded: loaded[1].image.size):
            embeds = codec.embed_prepared([prepared for _, prepared in batch]).numpy()
            vectors.update({item: vector for (item, _), vector in zip(batch, embeds, strict=True)})
            bar.advance(len(batch))
    return vectors


Rows = Sequence[tuple[str, str, Any]]


def _npy(rows: Rows) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.stack([vector for _, _, vector in rows]).astype(np.float32), allow_pickle=False)
    return buffer.getvalue()


def _parquet(rows: Rows) -> bytes:
    pyarrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    width = len(rows[0][2])
    table = pyarrow.table(
        {
            "kind": [kind for kind, _, _ in rows],
            "input": [name for _, name, _ in rows],
            "embedding": pyarrow.array(
                [vector.tolist() for _, _, vector in rows], pyarrow.list_(pyarrow.float32(), width)
            ),
        }
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
