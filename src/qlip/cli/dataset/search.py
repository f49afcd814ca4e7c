"""`qlip search`: images of a token dataset, found by words or by an image, rebuilt from their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, plural, print_json, print_table, stoppable, usage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from qlip.archive.manage.decode import Need
    from qlip.archive.search.search import Hit, Searcher
    from qlip.tokens import ImageCodec

AT_ONCE = 32
"""Images that are rebuilt at once."""

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="A folder that qlip tokenize wrote.")]
IndexFolder = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="The index's folder; DATASET/index by default.", show_default=False),
]


def search(
    dataset: Dataset,
    query: Annotated[
        str | None, typer.Argument(metavar="[WORDS]", help='What to look for: "a dog on a beach".')
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", metavar="FILE", help="Look for what resembles a picture.")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="KEY", help="Look for what resembles a picture of the dataset.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-k", min=1, max=1000, help="Pictures to find.")] = 16,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The pictures found, rebuilt from their tokens.")
    ] = Path("results.png"),
    table_only: Annotated[
        bool, typer.Option("--no-picture", help="Only say which they are: nothing is rebuilt.")
    ] = False,
    templates: Annotated[
        str | None,
        typer.Option(help="Average the words over prompts: cifar, imagenet, or a file; as they are by default."),
    ] = None,
    folder: IndexFolder = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Read all embeddings instead of asking the index: nothing is missed.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the index with its checksum first, a second a gigabyte.")
    ] = True,
    model: options.Maker = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Find images of a token dataset by words, by an image, or by one of its own.

    Scores are cosines of embeddings, best first; only their order means something. Of several views of an image the
    best one counts.
    """
    from qlip.archive.search.search import Searcher
    from qlip.cli import models, outputs

    if sum(one is not None for one in (query, image, like)) != 1:
        usage_error('say what to look for, one of: WORDS such as "a dog on a beach", --image FILE, --like KEY')
    if query is not None and not query.strip():
        usage_error('the words to look for are empty; give some, such as "a dog on a beach"')
    if templates is not None and query is None:
        usage_error("--templates goes with words; leave it out")
    if not table_only:
        outputs.check_picture_name(output)
    clock = _Clock()
    with stoppable("nothing was written"):
        with clock("open"):
            searcher = Searcher(dataset, folder, scan=exact, check=check)
        if searcher.index is None and not exact:
            count_read = plural(len(searcher.vectors), "embedding")
            note(f"no index, so all {count_read} are read; `qlip tokens index {dataset}` makes searching faster")
        needs: list[Need] = [*(["words"] if query else ["pictures"] if image else [])]  # type: ignore[list-item]
        with clock("model"):
            needs = needs if table_only else [*needs, "rebuilding"]
            codec = models.load_maker(searcher.info, dataset, model, needs, device) if needs else None
        with clock("query"):
            asked = _asked(searcher, codec, query, image, like, templates)
        with clock("search"):
            hits = searcher.search(asked.vector, count, asked.itself)
        if not table_only and codec is not None:
            with clock("rebuild"):
                _draw(searcher, codec, hits, asked, output)
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
    _print_hits(rows, searcher.info.views.count > 1)
    where = "" if table_only else f", rebuilt in {output}"
    print(f"\n{plural(len(rows), 'picture')} of {len(searcher.vectors):,} rows{where}")
    print(f"search {1000 * clock.seconds['search']:.0f} ms ({_described(searcher)}); {clock.rest('search')}")


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - began, 4)

    def rest(self, but: str) -> str:
        """All other steps, in words."""
        return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self.seconds.items() if what != but)


@dataclass(frozen=True)
class Asked:
    """What is looked for.

    Attributes:
        title: of the sheet.
        vector: (E,) float32, unit length.
        image: that stands beside the title.
        itself: (part, key) of the image of the dataset that it is.
    """

    title: str
    vector: NDArray[np.float32]
    picture: Image.Image | None = None
    itself: tuple[int, str] | None = None


def _asked(
    searcher: Searcher,
    codec: ImageCodec | None,
    query: str | None,
    image: Path | None,
    like: str | None,
    templates: str | None,
) -> Asked:
    from qlip.archive.manage.decode import rebuilt
    from qlip.cli.image import classify

    if like is not None:
        row, part = searcher.find(like)
        vector = searcher.embedding(row)
        shown = None
        if codec is not None:
            shown = rebuilt(searcher.dataset, [row], codec.model, codec.processor)[0]
        return Asked(f"like {like}", vector, shown, (part, like))
    assert codec is not None
    if image is not None:
        return _asked_by_picture(codec, image)
    assert query is not None
    if templates is not None:
        return Asked(query, classify.label_vectors(codec, [query], templates)[0])
    return Asked(query, codec.embed_texts([query])[0])


def _asked_by_picture(codec: ImageCodec, image: Path) -> Asked:
    prepared = codec.prepare(image)
    return Asked(image.name, codec.embed_prepared([prepared]).numpy()[0], prepared.image)


def _draw(searcher: Searcher, codec: ImageCodec, hits: Sequence[Hit], asked: Asked, output: Path) -> None:
    """The images found, rebuilt, on one sheet under what was asked for."""
    from qlip.archive.manage.decode import rebuilt
    from qlip.cli.image import dataset_sheets as sheets

    images: list[Image.Image] = []
    for start in range(0, len(hits), AT_ONCE):
        rows = [hit.number for hit in hits[start : start + AT_ONCE]]
        images += rebuilt(searcher.dataset, rows, codec.model, codec.processor)
    shown = [
        sheets.Shown(hit.row, one, f"{rank}  ", f"{hit.score:.3f} · ")
        for rank, (hit, one) in enumerate(zip(hits, images, strict=True), start=1)
    ]
    whole = f"the best {len(hits)} of {len(searcher.vectors):,}"
    sheets.write(output, shown, asked.title, whole, beside=asked.picture)


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
    """How: for --json."""
    if searcher.index is None:
        return {"kind": "scan", "rows": len(searcher.vectors), "effort": None, "recall": None}
    info = searcher.index.info
    measured = None if info.measured is None else info.measured.model_dump()
    return {"kind": info.kind, "rows": info.count, "effort": info.effort, "recall": measured}


def _described(searcher: Searcher) -> str:
    if searcher.index is None:
        return "all embeddings read, exact"
    info = searcher.index.info
    if info.measured is None:
        return f"{info.kind} index"
    words = "" if info.measured.words is None else f", {info.measured.words:.1%} by words"
    return f"{info.kind} index, recall@10 {info.measured.pictures:.1%} by pictures{words}"
