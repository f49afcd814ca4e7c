"""`qlip search`: images of a token dataset that match a text or an image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, plural, print_json, print_table, show, stoppable, usage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from qlip.archive.manage.decode import Need
    from qlip.archive.search.search import Hit, Searcher
    from qlip.tokens import ImageCodec

DECODE_BATCH = 32
"""Images decoded per batch."""

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Token dataset: a folder that qlip tokenize wrote.")]
IndexFolder = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="Folder of the index; default: DATASET/index.", show_default=False),
]


def search(
    dataset: Dataset,
    query: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help='Text to search for, such as "a dog on a beach".')
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", metavar="FILE", help="Search for images similar to this image file.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like", metavar="KEY", help="Search for images similar to the image with this key in the dataset."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-k", min=1, max=1000, help="Number of images to find.")] = 16,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Image file for a contact sheet of the images found.")
    ] = Path("results.png"),
    table_only: Annotated[
        bool, typer.Option("--no-image", help="Only list the results; write no contact sheet.")
    ] = False,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Prompts that the text is inserted into and averaged over: cifar, imagenet, or a file with one per "
            "line. Default: the text alone."
        ),
    ] = None,
    folder: IndexFolder = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact search: scan all embeddings, ignore the index.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Verify the index's checksum first, about 1 s per gigabyte.")
    ] = True,
    model: options.DatasetModel = None,
    device: options.Device = options.AUTO,
    as_json: options.Json = False,
) -> None:
    """Find images of a token dataset by text, by an image file, or by similarity to one of its images.

    Scores are cosines of embeddings, best first; only their order is meaningful. An image with several views is ranked
    by its best view.
    """
    from qlip.archive.search.search import Searcher
    from qlip.cli import models, outputs

    if sum(one is not None for one in (query, image, like)) != 1:
        usage_error('nothing to search for; give one of: TEXT such as "a dog on a beach", --image FILE, --like KEY')
    if query is not None and not query.strip():
        usage_error('the text to search for is empty; give one such as "a dog on a beach"')
    if templates is not None and query is None:
        usage_error("--templates needs a TEXT to search for; leave it out")
    if not table_only:
        outputs.check_image_name(output)
    clock = _Clock()
    with stoppable("nothing was written"):
        with clock("open"):
            searcher = Searcher(dataset, folder, scan=exact, check=check)
        if searcher.index is None and not exact:
            scanned = plural(len(searcher.vectors), "embedding")
            note(f"no index, so all {scanned} are scanned; `qlip tokens index {dataset}` makes searching faster")
        needs: list[Need] = [*(["text"] if query else ["images"] if image else [])]  # type: ignore[list-item]
        with clock("model"):
            needs = needs if table_only else [*needs, "decode"]
            codec = models.load_for_dataset(searcher.info, dataset, model, needs, device) if needs else None
        with clock("query"):
            wanted = _read_query(searcher, codec, query, image, like, templates)
        with clock("search"):
            hits = searcher.search(wanted.vector, limit, wanted.itself)
        if not table_only and codec is not None:
            with clock("rebuild"):
                _draw(searcher, codec, hits, wanted, output)
    rows = [_row(rank, hit) for rank, hit in enumerate(hits, start=1)]
    if as_json:
        print_json(
            {
                "dataset": dataset,
                "query": {"text": query, "image": image, "like": like, "templates": templates},
                "searched": _searched(searcher),
                "seconds": clock.seconds,
                "output": None if table_only else str(output),
                "results": rows,
            }
        )
        return
    _print_hits(rows, searcher.info.views.count != 1)
    where = "" if table_only else f", decoded in {output}"
    show(f"\n{plural(len(rows), 'image')} of {len(searcher.vectors):,} rows{where}")
    show(f"search {1000 * clock.seconds['search']:.0f} ms ({_described(searcher)}); {clock.without('search')}")


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - began, 4)

    def without(self, left_out: str) -> str:
        """Format all steps but one."""
        return ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self.seconds.items() if step != left_out)


@dataclass(frozen=True)
class Query:
    """The embedding to search for.

    Attributes:
        title: title of the contact sheet.
        vector: (E,) float32, unit length.
        image: image beside the title.
        itself: (part, key) of the query if it is an image of the dataset, which is then not a result.
    """

    title: str
    vector: NDArray[np.float32]
    image: Image.Image | None = None
    itself: tuple[int, str] | None = None


def _read_query(
    searcher: Searcher,
    codec: ImageCodec | None,
    query: str | None,
    image: Path | None,
    like: str | None,
    templates: str | None,
) -> Query:
    from qlip.archive.manage.decode import decode_batch
    from qlip.cli.image import classify

    if like is not None:
        row, part = searcher.find(like)
        vector = searcher.embedding(row)
        shown = None
        if codec is not None:
            shown = decode_batch(searcher.dataset, [row], codec.model, codec.processor)[0]
        return Query(f"like {like}", vector, shown, (part, like))
    assert codec is not None
    if image is not None:
        prepared = codec.prepare(image)
        return Query(image.name, codec.embed_prepared([prepared]).numpy()[0], prepared.image)
    assert query is not None
    if templates is not None:
        return Query(query, classify.label_vectors(codec, [query], templates)[0])
    return Query(query, codec.embed_texts([query])[0])


def _draw(searcher: Searcher, codec: ImageCodec, hits: Sequence[Hit], query: Query, output: Path) -> None:
    """Write a contact sheet of the images found, with the query in its heading."""
    from qlip.archive.manage.decode import decode_batch
    from qlip.cli.image.contact_sheet import SheetImage, write_rows

    images: list[Image.Image] = []
    for start in range(0, len(hits), DECODE_BATCH):
        rows = [hit.number for hit in hits[start : start + DECODE_BATCH]]
        images += decode_batch(searcher.dataset, rows, codec.model, codec.processor)
    shown = [
        SheetImage(hit.row, one, f"{rank}  ", f"{hit.score:.3f} · ")
        for rank, (hit, one) in enumerate(zip(hits, images, strict=True), start=1)
    ]
    write_rows(output, shown, query.title, f"best {len(hits)} of {len(searcher.vectors):,}", query.image)


def _row(rank: int, hit: Hit) -> dict[str, Any]:
    row = hit.row
    return {
        "rank": rank,
        "score": round(hit.score, 6),
        "key": row.key,
        "part": hit.part,
        "row": hit.number,
        "view": row.view,
        "label": row.label,
        "captions": list(row.captions),
        "original_size": list(row.original_size),
        "token_bytes": len(row.tokens),
    }


def _print_hits(rows: Sequence[dict[str, Any]], views: bool) -> None:
    columns = ["", "score", "key", "part", *(["view"] if views else []), "label", "caption"]
    table = new_table(*columns, numbers=("", "score", "part", "view"))
    for row in rows:
        cells = [str(row["rank"]), f"{row['score']:.4f}", row["key"], str(row["part"])]
        cells += [str(row["view"])] if views else []
        table.add_row(*cells, row["label"] or "", (row["captions"] or [""])[0])
    print_table(table)


def _searched(searcher: Searcher) -> dict[str, Any]:
    """Kind of the search, for --json."""
    if searcher.index is None:
        return {"kind": "scan", "rows": len(searcher.vectors), "effort": None, "recall": None}
    info = searcher.index.info
    measured = None if info.measured is None else info.measured.model_dump(by_alias=True)
    return {"kind": info.kind, "rows": info.count, "effort": info.effort, "recall": measured}


def _described(searcher: Searcher) -> str:
    if searcher.index is None:
        return "exact, all embeddings scanned"
    info = searcher.index.info
    if info.measured is None:
        return f"{info.kind} index"
    texts = "" if info.measured.texts is None else f", {info.measured.texts:.1%} for texts"
    return f"{info.kind} index, recall@10 {info.measured.images:.1%} for images{texts}"
