"""`qlip index` and `qlip search`: pictures of a token dataset, found by words or by a picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from qlip.cli import options
from qlip.cli.console import new_table, plural, print_json, print_table, progress, say, stoppable, usage_error
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.archive.index import IndexInfo
    from qlip.archive.search import Hit, Need, Searcher
    from qlip.archive.vectors import Vectors
    from qlip.cli.models import Tokenizer

KINDS = ("auto", "exact", "hnsw", "ivf")
WORDS = 200
"""Texts of the dataset that recall is measured with."""
TITLE, NAME = 20, 24
"""Letters under a picture, at most."""

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="A folder that qlip tokenize wrote.")]
IndexFolder = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="The index's folder; DATASET/index by default.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The model that made the dataset, where its name there does not lead to it.",
        rich_help_panel=options.MODEL_PANEL,
    ),
]


def index(
    dataset: Dataset,
    kind: Annotated[
        str, typer.Option(help="auto: exact up to 100,000 rows, ivf above. hnsw is faster to ask and larger.")
    ] = "auto",
    recall: Annotated[
        float,
        typer.Option(min=0, max=1, help="Recall@10 that hnsw or ivf should reach: it sets how far a search looks."),
    ] = 0.95,
    folder: IndexFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again even where it is up to date.")] = False,
    model: Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Index a token dataset's embeddings, so that searching does not read all of it.

    The recall of hnsw and ivf is measured against exact search, with pictures moved by noise and with the dataset's own
    words as queries. Stopped and started again, the old index is whole and ivf goes on where it was.
    """
    from qlip.archive.index import index_folder
    from qlip.archive.indexing import Build, build, up_to_date
    from qlip.archive.layout import Layout
    from qlip.archive.vectors import Vectors

    if kind not in KINDS:
        usage_error(f"--kind {kind}: take one of {', '.join(KINDS)}")
    vectors = Vectors(Layout(dataset))
    home = index_folder(vectors.layout, folder)
    wanted = None if kind == "auto" else cast(Literal["exact", "hnsw", "ivf"], kind)
    what = Build(kind=wanted, recall=recall)
    chosen = what.kind_for(len(vectors))
    info = None if force else up_to_date(vectors, home, chosen)
    made = info is None
    if info is None:
        with stoppable("the old index, if any, is whole; the same command goes on"):
            words = None if chosen == "exact" else _words(dataset, vectors, model, device)
            with progress("indexing", what.passes(len(vectors)) * len(vectors)) as bar:
                info = build(vectors, home, Build(kind=wanted, recall=recall, words=words, advance=bar.advance))
    if info.measured is not None and info.measured.least < recall:
        say(f"recall stays below {recall:g} even at the largest effort; take --kind ivf or exact")
    if as_json:
        print_json({"dataset": dataset, "folder": str(home), "made": made, "bytes": info.bytes} | info.model_dump())
    else:
        _print_index(info, home, made)


def _words(dataset: str, vectors: Vectors, model: str | None, device: str) -> NDArray[np.float32] | None:
    """Embeddings of words that the dataset itself holds, for measuring; None where there are none, or no model."""
    from qlip.archive.dataset import TokenDataset
    from qlip.archive.search import check_model, some_words
    from qlip.cli import embed, models

    texts = some_words(TokenDataset(dataset), WORDS)
    if not texts:
        return None
    try:
        tokenizer = models.load(model or vectors.info.model, device)
        check_model(vectors.info, dataset, tokenizer.model, tokenizer.processor, tokenizer.name, ["words"])
    except QLIPError as error:
        if model is not None:
            raise
        say(f"recall is measured with pictures alone, not with words: {error}")
        return None
    return embed.embed_text(tokenizer, texts)


def _print_index(info: IndexInfo, home: Path, made: bool) -> None:
    each = info.bytes / info.count
    state = f"made in {info.seconds:.1f} s" if made else "up to date"
    print(
        f"{home}: {info.kind}, {plural(info.count, 'embedding')} of {info.embedding_dim}, {info.bytes:,} bytes"
        f" ({each:.0f} a row), {state}"
    )
    if not info.recall:
        return
    effort = {"hnsw": "efSearch", "ivf": "nprobe"}[info.kind]
    table = new_table(effort, "recall@10, pictures", "words", "ms a query", "", numbers=(effort, "ms a query"))
    for one in info.recall:
        words = "-" if one.words is None else f"{one.words:.1%}"
        used = "is used" if one.effort == info.effort else ""
        table.add_row(str(one.effort), f"{one.pictures:.1%}", words, f"{one.milliseconds:.2f}", used)
    print_table(table)


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
    model: Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Find pictures of a token dataset by words, by a picture, or by one of its own.

    Scores are cosines of embeddings, best first; those of words with pictures are small numbers, and only their order
    means something. Of several views of a picture the best one counts.
    """
    from qlip.archive.search import Searcher
    from qlip.cli import outputs

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
            rows = plural(len(searcher.vectors), "embedding")
            say(f"no index, so all {rows} are read; `qlip index {dataset}` makes searching faster")
        needs: list[Need] = [*(["words"] if query else ["pictures"] if image else [])]  # type: ignore[list-item]
        with clock("model"):
            tokenizer = _model(searcher, dataset, model, device, needs if table_only else [*needs, "rebuilding"])
        with clock("query"):
            vector, itself = _vector(searcher, tokenizer, query, image, like, templates)
        with clock("search"):
            hits = searcher.search(vector, count, itself)
        if not table_only and tokenizer is not None:
            with clock("rebuild"):
                _draw(searcher, tokenizer, hits, _asked(query, image, like), image, output)
    rows = [_row(rank, hit) for rank, hit in enumerate(hits, start=1)]
    if as_json:
        asked = {"text": query, "image": None if image is None else str(image), "like": like, "templates": templates}
        print_json(
            {
                "dataset": dataset,
                "query": asked,
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


def _model(searcher: Searcher, dataset: str, model: str | None, device: str, needs: Sequence[Need]) -> Tokenizer | None:
    """The model that made the dataset, where it is needed at all."""
    from qlip.archive.search import check_model
    from qlip.cli import models

    if not needs:
        return None
    name = model or searcher.info.model
    try:
        tokenizer = models.load(name, device)
    except QLIPError as error:
        if model is not None:
            raise
        raise QLIPError(f"{error} (the dataset's model; --model gives another name for it)") from None
    check_model(searcher.info, dataset, tokenizer.model, tokenizer.processor, tokenizer.name, needs)
    return tokenizer


def _vector(
    searcher: Searcher,
    tokenizer: Tokenizer | None,
    query: str | None,
    image: Path | None,
    like: str | None,
    templates: str | None,
) -> tuple[NDArray[np.float32], tuple[int, str] | None]:
    """What is looked for as a unit vector, and the picture of the dataset that it is itself."""
    import numpy as np
    import torch

    from qlip.cli import classify, embed

    if like is not None:
        row, part = searcher.find(like)
        return searcher.vectors.at(np.array([row]))[0], (part, like)
    assert tokenizer is not None
    if query is not None:
        if templates is not None:
            return classify.label_vectors(tokenizer, [query], templates)[0], None
        return embed.embed_text(tokenizer, [query])[0], None
    assert image is not None
    pixels = tokenizer.processor.pixels(image)[None].to(tokenizer.model.device, tokenizer.model.dtype)
    with torch.inference_mode():
        features = tokenizer.model.get_image_features(pixels)
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()[0], None


def _asked(query: str | None, image: Path | None, like: str | None) -> str:
    return query or (image.name if image is not None else f"like {like}")


def _draw(
    searcher: Searcher, tokenizer: Tokenizer, hits: Sequence[Hit], asked: str, image: Path | None, output: Path
) -> None:
    """The pictures found, rebuilt, on one sheet under what was asked for."""
    from qlip.archive.search import rebuilt
    from qlip.cli import outputs, pictures
    from qlip.files import write_bytes
    from qlip.modeling import load_image

    images = rebuilt(searcher.dataset, [hit.number for hit in hits], tokenizer.model, tokenizer.processor)
    exhibits = [
        pictures.Exhibit(f"{rank}  {_title(hit)}", (("", one),), f"{hit.score:.3f} · {_tail(hit.row.key)}")
        for rank, (hit, one) in enumerate(zip(hits, images, strict=True), start=1)
    ]
    size = len(hits[0].row.tokens) if hits else 0
    detail = f"{len(hits)} of {len(searcher.vectors):,} pictures, each rebuilt from its {size:,} bytes of tokens"
    shown = None if image is None else tokenizer.processor.preprocessing.resized(load_image(image))
    sheets = [pictures.heading(asked, detail, shown)]
    if exhibits:
        sheets.append(pictures.draw(exhibits))
    write_bytes(output, outputs.picture_file(output, pictures.stack(sheets)))


def _title(hit: Hit) -> str:
    """What the dataset says in words of a picture, as much as fits."""
    said = hit.row.label or (hit.row.captions[0] if hit.row.captions else "")
    return said if len(said) <= TITLE else said[: TITLE - 3].rstrip() + "..."


def _tail(key: str) -> str:
    return key if len(key) <= NAME else "..." + key[3 - NAME :]


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
