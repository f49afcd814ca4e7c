"""Card of a dataset, README.md: content and how to read it, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from qlip.archive.dataset.layout import CARD, Entry, Layout
from qlip.archive.dataset.schema import DatasetInfo

TITLE = "Images as QLIP tokens"
MARK = "<!-- written by qlip; delete this line, and qlip leaves the card alone -->"
SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
"""Names of the Hub for numbers of rows below a bound."""


def write_card(layout: Layout, info: DatasetInfo, entries: Sequence[Entry]) -> None:
    """Write the card, unless there is one that qlip did not write."""
    path = layout.path(CARD)
    if layout.storage.exists(path) and MARK not in layout.storage.read(path).decode(errors="replace"):
        return
    layout.storage.write(path, card(info, entries).encode())


def card(info: DatasetInfo, entries: Sequence[Entry]) -> str:
    """Return the card's text, which does not depend on where the dataset lies."""
    rows, size = sum(entry.rows for entry in entries), sum(entry.bytes for entry in entries)
    skipped = sum(len(entry.errors) for entry in entries)
    grid = "several" if info.grid is None else f"{info.grid[0]} x {info.grid[1]}"
    facts = [
        ("rows", f"{rows:,} in {len(entries):,} parts, {size:,} bytes"),
        ("images", f"{sum(entry.inputs for entry in entries):,}, of which {skipped:,} could not be read"),
        (
            "views per image",
            f"{'several' if info.views.count is None else info.views.count} ({info.views.description})",
        ),
        ("grid", f"{grid} tokens"),
        ("token", f"{info.bits_per_token} bits, in groups of {info.group_size} by the model"),
        ("token bytes per row", f"{info.token_bytes}" if info.token_bytes is not None else "several"),
        ("coding", info.coding if info.table_hash is None else f"{info.coding}, tables `{info.table_hash}`"),
        ("model", f"`{info.model}`"),
        ("code fingerprint", f"`{info.code_fingerprint}`"),
        ("decoder fingerprint", f"`{info.decoder_fingerprint}`"),
        ("text fingerprint", f"`{info.text_fingerprint}`" if info.text_fingerprint else "no embeddings"),
        *([("preparation", f"`{info.preparation}`")] if info.preparation else []),
        ("forward passes", f"{info.dtype}, batches of {info.batch_size}, {info.device}"),
    ]
    return "\n".join(
        [
            _front(info, rows),
            MARK,
            f"\n# {TITLE}\n",
            "Images as tokens of [QLIP](https://arxiv.org/abs/2502.05178): packed bits from which the model's "
            "decoder reconstructs them.\n",
            _table(("", ""), facts),
            "\n## Columns\n",
            _table(("column", "type", "content"), _columns(info)),
            "\n## Reading it\n",
            _reading(info),
        ]
    )


def _front(info: DatasetInfo, rows: int) -> str:
    size = next((text for bound, text in SIZES if rows < bound), "n>1T")
    lines = [
        "---",
        f"pretty_name: {TITLE}",
        "tags:",
        "- image",
        "- image-tokens",
        "- qlip",
        "size_categories:",
        f"- {size}",
        *(["task_categories:", "- text-to-image"] if info.captions else []),
        "configs:",
        "- config_name: default",
        "  data_files: data/*.parquet",
        "---",
    ]
    return "\n".join(lines)


def _columns(info: DatasetInfo) -> list[tuple[str, str, str]]:
    size = info.token_bytes
    tokens = "entropy-coded" if info.coding == "entropy" else "packed bits, first bit first, in raster order"
    columns = [
        ("key", "string", "name of the image in its source"),
        ("view", "uint16", "number of the tile, in raster order")
        if info.views.fit == "tiles"
        else ("view", "uint8", "index of the view"),
        ("tokens", "binary" if size is None else f"fixed-size binary, {size}", tokens),
        ("grid", "uint16[2]", "height and width in tokens"),
        ("original_size", "uint32[2]", "width and height of the image in pixels"),
    ]
    if info.captions:
        columns += [
            ("captions", "list of string", "captions of the image"),
            ("label", "string", "class of the image, or null"),
        ]
    columns += [(name, "string", "field of the input, or null") for name in info.columns or ()]
    if info.embedding_dim is not None:
        columns.append(("embedding", f"float16[{info.embedding_dim}]", "unit vector, in one space with text"))
    return columns


def _reading(info: DatasetInfo) -> str:
    return f"""With qlip:

```python
from qlip.archive import TokenDataset

indices = TokenDataset("PATH")[0]  # int64 (N, {info.bits_per_token // info.group_size})
```

`qlip decode PATH -o images/` reconstructs the images, `qlip tokens verify PATH` checks every byte.

Without it:

```python
import pyarrow.dataset
table = pyarrow.dataset.dataset("PATH/data").to_table()

import datasets
rows = datasets.load_dataset("parquet", data_files="PATH/data/*.parquet", split="train")

import duckdb
duckdb.sql("SELECT key, octet_length(tokens) FROM 'PATH/data/*.parquet' LIMIT 5")
```
"""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
