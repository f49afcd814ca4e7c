"""Small token datasets for tests: random ones, and one of the images in the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.archive.dataset.layout import Layout, SkippedImage
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema
from qlip.modeling import load_image
from qlip.modeling.fingerprint import rest_fingerprint
from qlip.tokens import pack_batch

CODES, DECODER, TEXT = "c" * 64, "d" * 64, "e" * 64
"""Fingerprints of a model that is not there."""


def info(**changes: Any) -> DatasetInfo:
    """Of a model of 28 bits in groups of 14, no embeddings."""
    values: dict[str, Any] = {
        "model": "made up",
        "code_fingerprint": CODES,
        "decoder_fingerprint": DECODER,
        "bits_per_token": 28,
        "group_size": 14,
        "grid": (2, 2),
        "batch_size": 8,
    }
    return DatasetInfo(**values | changes)


def made(
    folder: Path,
    parts: int = 3,
    rows: int = 5,
    grid: tuple[int, int] | Sequence[tuple[int, int]] = (2, 2),
    bits: int = 28,
    group_size: int = 14,
    embedding_dim: int | None = 8,
    seed: int = 0,
    broken: int = 0,
    prefix: str = "",
    texts: Sequence[Sequence[str]] | None = None,
    **changes: Any,
) -> Layout:
    """A dataset of random tokens; equal arguments, equal bytes.

    Args:
        folder: to write to.
        parts, rows: of the dataset, and of a part.
        grid: (height, width) in tokens; of several, rows take turns and the dataset has no grid of its own.
        bits: a token.
        embedding_dim: None for no embeddings.
        broken: images a part that are in errors.parquet.
        prefix: of the keys, so that two datasets have none in common.
        texts: captions of the images in turn, with their first as label; by default the key's.
        changes: of the `DatasetInfo`.
    """
    grids = [grid] if isinstance(grid[0], int) else list(grid)
    values: dict[str, Any] = {
        "bits_per_token": bits,
        "group_size": group_size,
        "grid": grids[0] if len(grids) == 1 else None,
        "embedding_dim": embedding_dim,
        "text_fingerprint": TEXT if embedding_dim else None,
    }
    what = info(**values | changes)
    layout, random = Layout(str(folder)), np.random.default_rng(seed)
    layout.write_info(what)
    layout.storage.write(layout.path("source.json"), json.dumps({"input": "made up"}).encode())
    entries = []
    for part in range(parts):
        views = what.views.count
        table = table_of(what, [f"{prefix}{part:03d}-{row:04d}" for row in range(rows)], grids, random)
        if texts is not None:
            given = [list(texts[row // (views or 1) % len(texts)]) for row in range(rows)]
            for name, column in (("captions", given), ("label", [one[0] for one in given])):
                place = table.schema.get_field_index(name)
                table = table.set_column(place, table.schema.field(name), pa.array(column, table.schema.types[place]))
        errors = [SkippedImage(key=f"{prefix}{part:03d}-broken-{i}", reason="not an image") for i in range(broken)]
        inputs = rows // views + broken
        entries.append(layout.write_part(what, part, f"{prefix}{part:05d}.tar", inputs, table, errors))
    layout.write_manifest(entries)
    return layout


def table_of(what: DatasetInfo, names: Sequence[str], grids: Sequence[Any], random: np.random.Generator) -> pa.Table:
    """Random rows; where an image has several views, that many rows in a row share the first's name."""
    views = what.views.count
    chosen = [grids[row % len(grids)] for row in range(len(names))]
    packed = [
        pack_batch(torch.from_numpy(random.integers(0, 2, (1, h * w, what.bits_per_token))), 1)[0] for h, w in chosen
    ]
    columns: dict[str, Any] = {
        "key": [names[row // views * views] for row in range(len(names))],
        "view": [row % views for row in range(len(names))],
        "tokens": packed,
        "grid": [list(grid) for grid in chosen],
        "original_size": [[640 + row, 480] for row in range(len(names))],
    }
    if what.captions:
        columns["captions"] = [[f"an image called {name}", "another"][: 1 + row % 2] for row, name in enumerate(names)]
        columns["label"] = [["cat", "dog", None][row % 3] for row in range(len(names))]
    if what.embedding_dim is not None:
        vectors = random.standard_normal((len(names), what.embedding_dim))
        columns["embedding"] = list((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return pa.Table.from_pydict(columns, schema=arrow_schema(what))


def bundled_dataset(folder: Path, parts: int = 2) -> Layout:
    """The images in the package through the bundled model: 18 rows of 8 x 8 tokens with captions and embeddings."""
    model, processor = QLIPModel.from_pretrained("bundled").eval(), QLIPProcessor.from_pretrained("bundled")
    assert processor.tokenizer is not None
    bundled = assets.path("images")
    paths = [*sorted(bundled.glob("*.jpg")), *sorted((bundled / "drawings").glob("*.png"))]
    words = {}
    for line in (bundled / "captions.jsonl").read_text().splitlines():
        one = json.loads(line)
        words[one["image"]] = one
    images = [load_image(path) for path in paths]
    pixels = torch.stack([processor.preprocessing.pixels(processor.preprocessing.resized(one)) for one in images])
    with torch.inference_mode():
        indices = model.encode(pixels)
        vectors = torch.nn.functional.normalize(model.get_image_features(pixels), dim=-1)
    grid = model.grid_of(pixels)
    what = info(
        model="bundled",
        code_fingerprint=model.code_fingerprint,
        decoder_fingerprint=model.decoder_fingerprint,
        text_fingerprint=rest_fingerprint(model, processor.tokenizer.tokenizer.to_str()),
        bits_per_token=indices.shape[-1] * model.group_size,
        group_size=model.group_size,
        grid=grid,
        embedding_dim=vectors.shape[-1],
    )
    layout, packed = Layout(str(folder)), pack_batch(indices, model.group_size)
    layout.write_info(what)
    rows = [
        {
            "key": path.stem if path.parent == bundled else f"drawings/{path.stem}",
            "view": 0,
            "tokens": packed[row],
            "grid": list(grid),
            "original_size": list(images[row].size),
            "captions": words.get(path.name, {}).get("captions", []) if path.parent == bundled else [],
            "label": words.get(path.name, {}).get("label", path.stem),
            "embedding": vectors[row].to(torch.float16).numpy(),
        }
        for row, path in enumerate(paths)
    ]
    entries = []
    for part in range(parts):
        mine = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
        table = pa.Table.from_pylist(mine, schema=arrow_schema(what))
        entries.append(layout.write_part(what, part, f"images {part}", len(mine), table))
    layout.write_manifest(entries)
    return layout
