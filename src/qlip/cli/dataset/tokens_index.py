"""`qlip tokens index`: build the nearest-neighbour index of a token dataset's embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from qlip.cli import options
from qlip.cli.console import new_table, plural, print_json, print_table, progress, say, show, stoppable, usage_error
from qlip.cli.dataset.search import Dataset, IndexFolder
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.archive.search.embeddings import Vectors
    from qlip.archive.search.index import IndexInfo

KINDS = ("auto", "exact", "hnsw", "ivf")
NUM_TEXTS = 200
"""Captions and labels of the dataset that recall is measured with."""


def index(
    dataset: Dataset,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of index. auto: exact up to 100,000 rows, ivf above. hnsw: faster queries, larger index."
        ),
    ] = "auto",
    recall: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Recall@10 that hnsw or ivf should reach, which sets the effort of a search; default for a new index:"
            " 0.95. For an index that is up to date, the effort is measured again.",
            show_default=False,
        ),
    ] = None,
    folder: IndexFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild the index even if it is up to date.")] = False,
    model: options.DatasetModel = None,
    device: options.Device = options.AUTO,
    as_json: options.Json = False,
) -> None:
    """Index the embeddings of a token dataset, so that a search does not scan all of them.

    The recall of hnsw and ivf is measured against exact search, with noisy image embeddings and the dataset's own
    captions as queries. If the command is stopped, the old index stays usable; run it again to continue.
    """
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.search.build_index import RECALL, Build, build, set_recall, up_to_date
    from qlip.archive.search.embeddings import Vectors
    from qlip.archive.search.index import index_folder
    from qlip.archive.search.index_recall import is_set_for

    if kind not in KINDS:
        usage_error(f"--kind {kind}: choose one of {', '.join(KINDS)}")
    vectors = Vectors(Layout(dataset))
    home = index_folder(vectors.layout, folder)
    plan = Build(
        kind=None if kind == "auto" else cast(Literal["exact", "hnsw", "ivf"], kind),
        recall=RECALL if recall is None else recall,
    )
    chosen = plan.kind_for(len(vectors))
    info = None if force else up_to_date(vectors, home, plan.kind)
    made, measured = info is None, info is None and chosen != "exact"
    if info is not None and recall is not None and not is_set_for(info, recall):
        with stoppable("the index is unchanged; run the same command to measure it again"):
            texts = _text_embeddings(dataset, vectors, model, device)
            with progress("measuring", len(vectors)) as bar:
                info = set_recall(vectors, home, replace(plan, texts=texts, on_progress=bar.advance))
        measured = True
    if info is None:
        with stoppable("an old index is unchanged; run the same command to continue"):
            texts = None if chosen == "exact" else _text_embeddings(dataset, vectors, model, device)
            with progress("indexing", plan.passes(len(vectors)) * len(vectors)) as bar:
                info = build(vectors, home, replace(plan, texts=texts, on_progress=bar.advance))
    if (made or recall is not None) and info.measured is not None and info.measured.least < plan.recall:
        say(f"recall stays below {plan.recall:g} even at the largest effort; use --kind ivf or exact")
    if as_json:
        report = {"dataset": dataset, "folder": str(home), "made": made, "measured": measured, "bytes": info.bytes}
        print_json(report | info.model_dump(by_alias=True))
    else:
        _print_index(info, home, made, measured)


def _text_embeddings(dataset: str, vectors: Vectors, model: str | None, device: str) -> NDArray[np.float32] | None:
    """Embed captions of the dataset as test queries; None if it has none, or its model cannot be loaded."""
    from qlip.archive.dataset.dataset import TokenDataset
    from qlip.archive.search.search import sample_texts
    from qlip.cli import models

    texts = sample_texts(TokenDataset(dataset), NUM_TEXTS)
    if not texts:
        return None
    try:
        codec = models.load_for_dataset(vectors.info, dataset, model, ["text"], device)
    except QLIPError as error:
        if model is not None:
            raise
        say(f"recall is measured with images only, not with texts: {error}")
        return None
    return codec.embed_texts(texts)


def _print_index(info: IndexInfo, home: Path, made: bool, measured: bool) -> None:
    each = info.bytes / info.count
    kept = "up to date, recall measured again" if measured else "up to date"
    state = f"made in {info.seconds:.1f} s" if made else kept
    show(
        f"{home}: {info.kind}, {plural(info.count, 'embedding')} of {info.embedding_dim}, {info.bytes:,} bytes"
        f" ({each:.0f} per row), {state}"
    )
    if not info.recall:
        return
    effort = {"hnsw": "efSearch", "ivf": "nprobe"}[info.kind]
    table = new_table(effort, "recall@10, images", "texts", "ms per query", "", numbers=(effort, "ms per query"))
    for one in info.recall:
        texts = "-" if one.texts is None else f"{one.texts:.1%}"
        used = "in use" if one.effort == info.effort else ""
        table.add_row(str(one.effort), f"{one.images:.1%}", texts, f"{one.milliseconds:.2f}", used)
    print_table(table)
