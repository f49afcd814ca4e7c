"""`qlip tokens index`: nearest neighbours of a token dataset's embeddings, found out once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from qlip.cli import options
from qlip.cli.console import new_table, plural, print_json, print_table, progress, say, stoppable, usage_error
from qlip.cli.dataset.search import Dataset, IndexFolder
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.archive.search.embeddings import Vectors
    from qlip.archive.search.index import IndexInfo

KINDS = ("auto", "exact", "hnsw", "ivf")
WORDS = 200
"""Texts of the dataset that recall is measured with."""


def index(
    dataset: Dataset,
    kind: Annotated[
        str, typer.Option(help="auto: exact up to 100,000 rows, ivf above. hnsw is faster to ask and larger.")
    ] = "auto",
    recall: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Recall@10 that hnsw or ivf should reach, 0.95 when it is made: it sets how far a search looks. Of an"
            " index that is up to date, it is measured again.",
            show_default=False,
        ),
    ] = None,
    folder: IndexFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again even where it is up to date.")] = False,
    model: options.Maker = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Index a token dataset's embeddings, so that searching does not read all of it.

    The recall of hnsw and ivf is measured against exact search, with images moved by noise and with the dataset's own
    words as queries. Stopped and started again, the old index is whole and ivf goes on where it was.
    """
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.search.build_index import RECALL, Build, build, set_recall, up_to_date
    from qlip.archive.search.embeddings import Vectors
    from qlip.archive.search.index import index_folder
    from qlip.archive.search.index_recall import is_set_for

    if kind not in KINDS:
        usage_error(f"--kind {kind}: take one of {', '.join(KINDS)}")
    vectors = Vectors(Layout(dataset))
    home = index_folder(vectors.layout, folder)
    what = Build(
        kind=None if kind == "auto" else cast(Literal["exact", "hnsw", "ivf"], kind),
        recall=RECALL if recall is None else recall,
    )
    chosen = what.kind_for(len(vectors))
    info = None if force else up_to_date(vectors, home, what.kind)
    made, measured = info is None, info is None and chosen != "exact"
    if info is not None and recall is not None and not is_set_for(info, recall):
        with stoppable("the index is as it was; the same command measures it again"):
            words = _words(dataset, vectors, model, device)
            with progress("measuring", len(vectors)) as bar:
                info = set_recall(vectors, home, replace(what, words=words, on_progress=bar.advance))
        measured = True
    if info is None:
        with stoppable("the old index, if any, is whole; the same command goes on"):
            words = None if chosen == "exact" else _words(dataset, vectors, model, device)
            with progress("indexing", what.passes(len(vectors)) * len(vectors)) as bar:
                info = build(vectors, home, replace(what, words=words, on_progress=bar.advance))
    if (made or recall is not None) and info.measured is not None and info.measured.least < what.recall:
        say(f"recall stays below {what.recall:g} even at the largest effort; take --kind ivf or exact")
    if as_json:
        report = {"dataset": dataset, "folder": str(home), "made": made, "measured": measured, "bytes": info.bytes}
        print_json(report | info.model_dump())
    else:
        _print_index(info, home, made, measured)


def _words(dataset: str, vectors: Vectors, model: str | None, device: str) -> NDArray[np.float32] | None:
    """Embeddings of words that the dataset itself holds, for measuring; None where there are none, or no model."""
    from qlip.archive.dataset.dataset import TokenDataset
    from qlip.archive.search.search import some_words
    from qlip.cli import models

    texts = some_words(TokenDataset(dataset), WORDS)
    if not texts:
        return None
    try:
        codec = models.load_maker(vectors.info, dataset, model, ["words"], device)
    except QLIPError as error:
        if model is not None:
            raise
        say(f"recall is measured with pictures alone, not with words: {error}")
        return None
    return codec.embed_texts(texts)


def _print_index(info: IndexInfo, home: Path, made: bool, measured: bool) -> None:
    each = info.bytes / info.count
    kept = "up to date, its recall measured again" if measured else "up to date"
    state = f"made in {info.seconds:.1f} s" if made else kept
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
