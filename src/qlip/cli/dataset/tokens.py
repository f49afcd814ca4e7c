"""`qlip tokens`: what is in a dataset, whether it is whole, and datasets out of datasets."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import (
    FAILURE,
    new_table,
    note,
    plural,
    print_json,
    print_table,
    progress,
    say,
    stoppable,
    usage_error,
)
from qlip.cli.dataset import tokens_codec, tokens_index

if TYPE_CHECKING:
    from qlip.archive.dataset.dataset import Row
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.dataset.schema import DatasetInfo
    from qlip.archive.manage.merge import Built

app = typer.Typer(
    help="Manage token datasets: verify, merge, split, sample, share, index, and code in fewer bytes.",
    no_args_is_help=True,
)
app.add_typer(tokens_codec.app, name="codec")
app.command("index")(tokens_index.index)

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="A folder that qlip tokenize wrote, or its address.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for what is made.")]
Seed = Annotated[int, typer.Option(help="Of the chance: the same seed, the same rows.")]
GOES_ON = "finished parts are kept; the same command goes on"
SHOWN = 20
"""Findings that are listed; of more, the number."""


class By(StrEnum):
    """What a split moves."""

    rows = "rows"
    parts = "parts"


@app.command("info")
def info(dataset: Dataset, as_json: options.Json = False) -> None:
    """Say what a dataset holds, which model made it, and how large it is."""
    from qlip.archive.dataset.layout import Layout

    layout = Layout(dataset)
    what, entries = layout.read_info(), layout.manifest()
    report = {
        "dataset": layout.address,
        "parts": len(entries),
        "rows": sum(entry.rows for entry in entries),
        "pictures": sum(entry.inputs for entry in entries),
        "broken": sum(len(entry.errors) for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "token_bytes": what.token_bytes,
    }
    if as_json:
        print_json(report | {"info": what.model_dump(mode="json")})
        return
    for name, value in _facts(report, what):
        print(f"{name:<12} {value}")


def _facts(report: dict[str, Any], what: DatasetInfo) -> list[tuple[str, str]]:
    rows, size = report["rows"], report["bytes"]
    a_row = f", {size / rows:,.1f} a row" if rows else ""
    grid = "several" if what.grid is None else f"{what.grid[0]} x {what.grid[1]}"
    tokens = "" if report["token_bytes"] is None else f", {report['token_bytes']:,} bytes a row"
    facts = [
        ("rows", f"{rows:,} in {plural(report['parts'], 'part')}"),
        ("pictures", f"{report['pictures']:,}, of which {report['broken']:,} could not be read"),
        ("bytes", f"{size:,}{a_row}"),
        ("tokens", f"{grid} of {what.bits_per_token} bits, in groups of {what.group_size}{tokens}"),
        ("coding", what.coding),
        ("views", f"{what.views.crops}, {what.views.fit}"),
        ("captions", "yes" if what.captions else "no"),
        ("embeddings", "no" if what.embedding_dim is None else f"float16, {what.embedding_dim}"),
        ("model", what.model),
        ("codes", what.code_fingerprint),
        ("decoder", what.decoder_fingerprint),
    ]
    if what.text_fingerprint is not None:
        facts.append(("text", what.text_fingerprint))
    if what.preparation is not None:
        facts.append(("preparation", what.preparation))
    return [*facts, ("made in", f"{what.dtype}, batches of {what.batch_size}, {what.device}")]


@app.command("verify")
def verify(
    dataset: Dataset,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Rebuild the manifest, dataset.json and errors.parquet from the intact parts and entries."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Check every byte of a dataset except its card, and name the damaged files and the shards to tokenise again.

    Exit code 1 if something is wrong and was not repaired.
    """
    from qlip.archive.manage.verify import verify as check

    layout = _layout(dataset)
    advice = "the same command starts again" if repair else "nothing was changed"
    with stoppable(advice), progress("verifying parts", _count_parts(layout)) as bar:
        report = check(layout, repair=repair, on_progress=bar.advance)
    if as_json:
        counts = {name: getattr(report, name) for name in ("parts", "rows", "images", "skipped", "bytes")}
        findings = [asdict(one) for one in report.findings]
        print_json(
            {"dataset": layout.address, "intact": report.intact}
            | counts
            | {"findings": findings, "notes": report.notes}
        )
    else:
        for one in report.findings[:SHOWN]:
            print(f"{one.file}: {one.what}{'; repaired' if one.repaired else ''}")
        if len(report.findings) > SHOWN:
            print(f"and {len(report.findings) - SHOWN:,} more")
        for line in report.notes:
            say(line)
        state = "intact" if report.intact else plural(sum(not one.repaired for one in report.findings), "fault")
        counted = f"{plural(report.parts, 'part')}, {plural(report.rows, 'row')}, {report.bytes:,} bytes"
        print(f"{layout.address}: {state}; {counted}")
        if any(one.repairable and not one.repaired for one in report.findings):
            say(f"qlip tokens verify {dataset} --repair rebuilds the records")
    if not report.intact:
        raise typer.Exit(FAILURE)


@app.command("merge")
def merge(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET...", help="Of one model's codes.")],
    output: Output,
    unique: Annotated[bool, typer.Option("--unique", help="Refuse where a key is in more than one.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make one dataset of several; their parts are held against their checksums, and copied where columns agree."""
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.manage.merge import merge as build

    sources = [_layout(dataset) for dataset in datasets]
    with stoppable(GOES_ON), progress("merging parts", sum(map(_count_parts, sources))) as bar:
        built = build(sources, Layout(output), unique=unique, on_progress=bar.advance)
    if built.repeated:
        some = ", ".join(repr(key) for key in built.examples[:3])
        say(f"{plural(built.repeated, 'key')} in more than one dataset, such as {some}; --unique would refuse them")
    for difference in built.notes:
        say(f"they differ: {difference}")
    _report({output: built}, as_json)


@app.command("split")
def split(
    dataset: Dataset,
    shares: Annotated[
        list[str], typer.Argument(metavar="DIR=SHARE...", help="Folders and their shares: train=0.9 test=0.1.")
    ],
    by: Annotated[
        By, typer.Option(help="rows: a hash of the key decides, so views stay together; parts: these are copied.")
    ] = By.rows,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Make several datasets of one, disjoint and together all of it."""
    from qlip.archive.manage.merge import split as build

    wanted: dict[str, float] = {}
    for share in shares:
        folder, equals, number = share.rpartition("=")
        try:
            wanted[folder] = float(number)
        except ValueError:
            equals = ""
        if not equals or not folder:
            usage_error(f"{share}: give a folder and its share, such as train=0.9")
    layout = _layout(dataset)
    with stoppable(GOES_ON), progress("splitting parts", _count_parts(layout)) as bar:
        built = build(layout, wanted, by=by.value, seed=seed, on_progress=bar.advance)
    _report(built, as_json)


@app.command("sample")
def sample(
    dataset: Dataset,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Rows to draw.")] = 10,
    seed: Seed = 0,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for them as a dataset.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE", help="Their pictures, rebuilt, side by side.")] = None,
    model: options.Maker = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Draw rows by chance: as a list, as a sheet of images, or as a dataset of their own."""
    from qlip.archive import TokenDataset
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.manage.merge import sample as build
    from qlip.archive.manage.merge import sample_rows
    from qlip.cli import models, outputs
    from qlip.cli.image import decode_dataset as rebuild

    if sheet is not None:
        outputs.check_picture_name(sheet)
    source = TokenDataset(dataset)
    numbers = sample_rows(len(source), count, seed)
    if sheet is not None:
        tokenizer = models.load_maker(source.info, dataset, model, ["rebuilding"], device)
        rebuild.draw_sheet(source, numbers, tokenizer, sheet, batch_size=32)
        note(f"{plural(len(numbers), 'picture')} on {sheet}")
    if output is not None:
        with stoppable(GOES_ON):
            _report({output: build(source, Layout(output), count, seed)}, as_json)
    elif as_json or sheet is None:
        _print_rows(dataset, numbers.tolist(), source.rows(numbers), as_json)


@app.command("export")
def export(dataset: Dataset, output: Output, as_json: options.Json = False) -> None:
    """Write a dataset as tars of .qlip, .txt and .json files, which the webdataset library reads."""
    from qlip.archive import TokenDataset
    from qlip.archive.manage.export_webdataset import export as write

    source = TokenDataset(dataset)
    with stoppable("finished tars are kept; the same command goes on"), progress("exporting rows", len(source)) as bar:
        tars = write(source, output, on_progress=bar.advance)
    if as_json:
        print_json({"dataset": dataset, "output": output, "tars": tars, "rows": len(source)})
    else:
        print(f"{plural(len(source), 'row')} in {plural(tars, 'tar')} in {output}")


@app.command("push")
def push(
    dataset: Dataset,
    name: Annotated[str, typer.Argument(metavar="NAME", help="On the Hugging Face Hub: you/dataset.")],
    private: Annotated[bool, typer.Option("--private", help="Only you see it, if it is new.")] = False,
) -> None:
    """Upload a dataset to the Hugging Face Hub, with its card; log in first: hf auth login."""
    from qlip.archive.manage import hub

    with stoppable("what was sent is kept; the same command goes on"):
        print(hub.push(_layout(dataset), name, private=private))


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="On the Hugging Face Hub: you/dataset.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for it; the Hub's cache by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.")] = None,
    as_json: options.Json = False,
) -> None:
    """Download a dataset from the Hugging Face Hub, and verify it."""
    from qlip.archive.manage import hub

    with stoppable("what came is kept; the same command goes on"):
        folder = hub.pull(name, output, revision=revision)
    verify(folder, repair=False, as_json=as_json)


def _layout(dataset: str) -> Layout:
    from qlip.archive.dataset.layout import Layout

    layout = Layout(dataset)
    if not layout.exists():
        layout.read_info()  # says so
    return layout


def _count_parts(layout: Layout) -> int:
    return len(layout.storage.glob(layout.path("manifest/part-*.json")))


def _report(built: dict[str, Built], as_json: bool) -> None:
    if as_json:
        found = [
            {"dataset": name, "rows": one.rows, "parts": one.parts, "repeated_keys": one.repeated, "notes": one.notes}
            for name, one in built.items()
        ]
        print_json({"results": found})
        return
    table = new_table("dataset", "rows", "parts", numbers=("rows", "parts"))
    for name, one in built.items():
        table.add_row(name, f"{one.rows:,}", f"{one.parts:,}")
    print_table(table)


def _print_rows(dataset: str, numbers: list[int], rows: list[Row], as_json: bool) -> None:
    if as_json:
        found = [
            {
                "row": number,
                "key": row.key,
                "view": row.view,
                "label": row.label,
                "captions": list(row.captions),
                "grid": list(row.grid),
                "original_size": list(row.original_size),
                "tokens": row.tokens.hex(),
            }
            for number, row in zip(numbers, rows, strict=True)
        ]
        print_json({"dataset": dataset, "results": found})
        return
    table = new_table("row", "key", "label", "caption", "size", "grid", numbers=("row",))
    for number, row in zip(numbers, rows, strict=True):
        size, grid = ("{} x {}".format(*pair) for pair in (row.original_size, row.grid))
        table.add_row(f"{number:,}", row.key, row.label or "", (row.captions or ("",))[0], size, grid)
    print_table(table)
