"""`qlip tokens`: describe, verify, merge, split, sample, export and share token datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    show,
    stoppable,
    usage_error,
)
from qlip.cli.dataset import tokens_codec, tokens_index
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.archive.dataset.dataset import Row
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.dataset.schema import DatasetInfo
    from qlip.archive.manage.merge import BuildResult

app = typer.Typer(
    help="Manage token datasets: verify, merge, split, sample, share, index, and code in fewer bytes.",
    no_args_is_help=True,
)
app.add_typer(tokens_codec.app, name="codec")
app.command("index")(tokens_index.index)

Dataset = Annotated[
    str, typer.Argument(metavar="DATASET", help="Token dataset: a folder that qlip tokenize wrote, or its address.")
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Accept a dataset that lacks parts, or whose run has not ended.")
]
ADVICE = "finished parts are kept; run the same command to continue"
MOST_LISTED = 20
"""Findings that are listed; more are counted."""


class By(StrEnum):
    """Units that a split distributes."""

    rows = "rows"
    parts = "parts"


class ExportFormat(StrEnum):
    """Formats of `qlip tokens export`."""

    webdataset = "webdataset"
    npy = "npy"
    bin = "bin"


@app.command("info")
def info(dataset: Dataset, as_json: options.Json = False) -> None:
    """Describe a dataset: its contents, its size, and the model that made it."""
    from qlip.archive.dataset.completeness import missing_parts
    from qlip.archive.dataset.layout import Layout

    layout = Layout(dataset)
    described, entries = layout.read_info(), layout.manifest()
    missing = missing_parts(layout, entries)
    report = {
        "dataset": layout.address,
        "parts": len(entries),
        "missing": str(missing) if missing else None,
        "rows": sum(entry.rows for entry in entries),
        "images": sum(entry.inputs for entry in entries),
        "skipped": sum(len(entry.errors) for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "token_bytes": described.token_bytes,
    }
    if as_json:
        print_json(report | {"info": described.model_dump(mode="json")})
        return
    for name, value in _facts(report, described):
        show(f"{name:<12} {value}")


def _facts(report: dict[str, Any], described: DatasetInfo) -> list[tuple[str, str]]:
    rows, size = report["rows"], report["bytes"]
    per_row = f", {size / rows:,.1f} per row" if rows else ""
    grid = "several grids" if described.grid is None else f"{described.grid[0]} x {described.grid[1]}"
    tokens = "" if report["token_bytes"] is None else f", {report['token_bytes']:,} bytes per row"
    facts = [
        ("rows", f"{rows:,} in {plural(report['parts'], 'part')}"),
        *([("incomplete", report["missing"])] if report["missing"] else []),
        ("images", f"{report['images']:,}, of which {report['skipped']:,} could not be read"),
        ("bytes", f"{size:,}{per_row}"),
        ("tokens", f"{grid} of {described.bits_per_token} bits, in groups of {described.group_size}{tokens}"),
        ("coding", described.coding),
        ("views", described.views.description),
        ("captions", "yes" if described.captions else "no"),
        *([("columns", ", ".join(described.columns))] if described.columns else []),
        ("embeddings", "no" if described.embedding_dim is None else f"float16, {described.embedding_dim}"),
        ("model", described.model),
        ("codes", described.code_fingerprint),
        ("decoder", described.decoder_fingerprint),
    ]
    if described.text_fingerprint is not None:
        facts.append(("text", described.text_fingerprint))
    if described.preparation is not None:
        facts.append(("preparation", described.preparation))
    return [*facts, ("made in", f"{described.dtype}, batches of {described.batch_size}, {described.device}")]


@app.command("verify")
def verify(
    dataset: Dataset,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Rebuild the manifest, dataset.json and errors.parquet from the intact parts and entries."
        ),
    ] = False,
    allow_partial: AllowPartial = False,
    as_json: options.Json = False,
) -> None:
    """Check every byte of a dataset except its card, and name the damaged files and the shards to tokenise again.

    Exit code 1 if something is wrong and was not repaired.
    """
    from qlip.archive.manage.verify import verify as check

    layout = _layout(dataset)
    advice = "run the same command again" if repair else "nothing was changed"
    with stoppable(advice), progress("verifying parts", _count_parts(layout)) as bar:
        report = check(layout, repair=repair, allow_partial=allow_partial, on_progress=bar.advance)
    if as_json:
        counts = {name: getattr(report, name) for name in ("parts", "rows", "images", "skipped", "bytes")}
        findings = [asdict(one) for one in report.findings]
        print_json(
            {"dataset": layout.address, "intact": report.intact}
            | counts
            | {"findings": findings, "notes": report.notes}
        )
    else:
        for one in report.findings[:MOST_LISTED]:
            show(f"{one.file}: {one.what}{'; repaired' if one.repaired else ''}")
        if len(report.findings) > MOST_LISTED:
            show(f"and {len(report.findings) - MOST_LISTED:,} more")
        for line in report.notes:
            note(line)
        state = "intact" if report.intact else plural(sum(not one.repaired for one in report.findings), "fault")
        counted = f"{plural(report.parts, 'part')}, {plural(report.rows, 'row')}, {report.bytes:,} bytes"
        show(f"{layout.address}: {state}; {counted}")
        if any(one.repairable and not one.repaired for one in report.findings):
            note(f"qlip tokens verify {dataset} --repair rebuilds the records")
    if not report.intact:
        raise typer.Exit(FAILURE)


@app.command("merge")
def merge(
    datasets: Annotated[
        list[str], typer.Argument(metavar="DATASET...", help="Token datasets with codes of one model.")
    ],
    output: Output,
    unique: Annotated[bool, typer.Option("--unique", help="Fail if a key is in more than one dataset.")] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="If a key is in several datasets, keep the rows of the first one.")
    ] = False,
    allow_partial: AllowPartial = False,
    as_json: options.Json = False,
) -> None:
    """Join several datasets into one; checksums of their parts are verified."""
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.manage.merge import merge as build

    sources = [_layout(dataset) for dataset in datasets]
    with _option_named(), stoppable(ADVICE), progress("merging parts", sum(map(_count_parts, sources))) as bar:
        built = build(
            sources,
            Layout(output),
            unique=unique,
            drop_duplicates=drop_duplicates,
            allow_partial=allow_partial,
            on_progress=bar.advance,
        )
    if built.repeated:
        some = ", ".join(repr(key) for key in built.examples[:3])
        did = "kept once" if drop_duplicates else "--drop-duplicates keeps the first, --unique makes this an error"
        say(f"{plural(built.repeated, 'key')} in more than one dataset, such as {some}; {did}")
    for difference in built.notes:
        note(f"the datasets differ: {difference}")
    _report({output: built}, as_json)


@app.command("split")
def split(
    dataset: Dataset,
    shares: Annotated[
        list[str],
        typer.Argument(metavar="DIR=SHARE...", help="Folders of the results and their shares: train=0.9 test=0.1."),
    ],
    by: Annotated[
        By,
        typer.Option(
            help="Unit to distribute. rows: by a hash of the key, so that views of an image stay together; "
            "parts: whole files."
        ),
    ] = By.rows,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Divide a dataset into several disjoint ones."""
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
    with stoppable(ADVICE), progress("splitting parts", _count_parts(layout)) as bar:
        built = build(layout, wanted, by=by.value, seed=seed, on_progress=bar.advance)
    _report(built, as_json)


@app.command("sample")
def sample(
    dataset: Dataset,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Number of rows to draw.")] = 10,
    seed: options.Seed = 0,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for a dataset of the rows.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image file for a contact sheet of the rows.")
    ] = None,
    model: options.DatasetModel = None,
    device: options.Device = options.AUTO,
    as_json: options.Json = False,
) -> None:
    """Draw random rows: as a list, as a contact sheet of images, or as a dataset of their own."""
    from qlip.archive import TokenDataset
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.manage.merge import sample as build
    from qlip.archive.manage.merge import sample_rows
    from qlip.cli import models, outputs
    from qlip.cli.image import decode_dataset

    if sheet is not None:
        outputs.check_image_name(sheet)
    source = TokenDataset(dataset)
    numbers = sample_rows(len(source), limit, seed)
    if sheet is not None:
        codec = models.load_for_dataset(source.info, dataset, model, ["decode"], device)
        decode_dataset.draw_sheet(source, numbers, codec, sheet, batch_size=32)
        note(f"{plural(len(numbers), 'image')} on {sheet}")
    if output is not None:
        with stoppable(ADVICE):
            _report({output: build(source, Layout(output), limit, seed)}, as_json)
    elif as_json or sheet is None:
        _print_rows(dataset, numbers.tolist(), source.rows(numbers), as_json)


@app.command("export")
def export(
    dataset: Dataset,
    output: Output,
    file_format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="Format. webdataset: tars of .qlip, .txt and .json files. npy: one array of ids, uint16, a row per "
            "image. bin: the same numbers without a header, as nanoGPT's trainer reads them.",
        ),
    ] = ExportFormat.webdataset,
    group_size: Annotated[
        int | None,
        typer.Option(help="Bits per id of npy and bin, a divisor of the token's bits; default: the model's groups."),
    ] = None,
    begin: Annotated[
        bool, typer.Option("--begin", help="Begin each image of npy and bin with an id of its own.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a dataset for other trainers: as tars for the webdataset library, or as one array of ids."""
    from qlip.archive import TokenDataset
    from qlip.archive.manage.export_arrays import export_arrays
    from qlip.archive.manage.export_webdataset import export as write

    if file_format is ExportFormat.webdataset and (group_size is not None or begin):
        usage_error("--group-size and --begin are for --format npy and bin")
    if file_format is not ExportFormat.webdataset:
        source = TokenDataset(dataset, group_size)
        with stoppable("nothing was kept"), progress("exporting rows", len(source)) as bar:
            path = export_arrays(
                source,
                Path(output),
                "npy" if file_format is ExportFormat.npy else "bin",
                begin=begin,
                on_progress=bar.advance,
            )
        if as_json:
            print_json({"dataset": dataset, "output": str(path), "rows": len(source)})
        else:
            show(f"{plural(len(source), 'row')} in {path}")
        return
    source = TokenDataset(dataset)
    with (
        stoppable("finished tars are kept; run the same command to continue"),
        progress("exporting rows", len(source)) as bar,
    ):
        tars = write(source, output, on_progress=bar.advance)
    if as_json:
        print_json({"dataset": dataset, "output": output, "tars": tars, "rows": len(source)})
    else:
        show(f"{plural(len(source), 'row')} in {plural(tars, 'tar')} in {output}")


@app.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of .qlip files, with subfolders.")],
    output: Output,
    model: options.Model = options.DEFAULT_MODEL,
    as_json: options.Json = False,
) -> None:
    """Make a dataset of .qlip files; captions come from a .json or .txt file beside each."""
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.manage.import_files import SUFFIX, import_files
    from qlip.cli import models

    codec, target = models.load(model, "cpu"), Layout(output)
    total = 2 * sum(1 for _ in folder.rglob(f"*{SUFFIX}"))
    with stoppable(ADVICE), progress("importing files", total) as bar:
        built = import_files(folder, target, codec, on_progress=bar.advance)
    skipped = sum(len(entry.errors) for entry in target.manifest())
    if skipped:
        say(f"{plural(skipped, 'file')} could not be taken; {target.path('errors.parquet')} lists them")
    _report({output: built}, as_json)


@app.command("push")
def push(
    dataset: Dataset,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the Hugging Face Hub: USER/DATASET.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new dataset private.")] = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Upload a dataset and its card to the Hugging Face Hub; log in first with hf auth login."""
    from qlip.archive.manage import hub

    with _option_named(), stoppable("finished uploads are kept; run the same command to continue"):
        show(hub.push(_layout(dataset), name, private=private, allow_partial=allow_partial))


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the Hugging Face Hub: USER/DATASET.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the dataset; default: the Hub's cache."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit to download; default: the main branch.")
    ] = None,
    allow_partial: AllowPartial = False,
    as_json: options.Json = False,
) -> None:
    """Download a dataset from the Hugging Face Hub and verify it."""
    from qlip.archive.manage import hub

    with stoppable("finished downloads are kept; run the same command to continue"):
        folder = hub.pull(name, output, revision=revision)
    verify(folder, repair=False, allow_partial=allow_partial, as_json=as_json)


@contextmanager
def _option_named() -> Iterator[None]:
    """Name the option in the error of a dataset that lacks parts."""
    from qlip.archive.dataset.completeness import PartialDatasetError

    try:
        yield
    except PartialDatasetError as error:
        raise QLIPError(f"{error} with --allow-partial") from None


def _layout(dataset: str) -> Layout:
    from qlip.archive.dataset.layout import Layout

    layout = Layout(dataset)
    if not layout.exists():
        layout.read_info()  # raises the error
    return layout


def _count_parts(layout: Layout) -> int:
    return len(layout.storage.glob(layout.path("manifest/part-*.json")))


def _report(built: dict[str, BuildResult], as_json: bool) -> None:
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
