"""`qlip decode`: images from `.qlip` files or from a token dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import inputs, io_pipeline, options
from qlip.cli.console import Failures, progress, stoppable, usage_error
from qlip.cli.image import decode_dataset
from qlip.cli.image.encode import Row, report
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from PIL import Image

    from qlip.tokens import TokenFile

DATASET = "Decoding a dataset"


def decode(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE.qlip... | DATASET",
            help="`.qlip` files, folders or patterns such as 'tokens/*.qlip'; or a dataset that `qlip tokenize` wrote.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the images, created if absent; for .qlip files the current folder by default.",
            show_default=False,
        ),
    ] = None,
    original_size: Annotated[
        bool, typer.Option("--original-size", help="Resize to the size that the encoded region had in the original.")
    ] = False,
    overwrite: options.Overwrite = False,
    skip_existing: options.SkipExisting = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Model that made the tokens: a checkpoint folder, a Hub id or a name. Default: "
            f"{options.DEFAULT_MODEL}, or for a dataset the model that it names.",
            rich_help_panel=options.MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    tables: options.EntropyTables = None,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    max_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Largest number of tokens of a .qlip file; the time of more grows with its square. Tiles are exempt.",
        ),
    ] = 16_384,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image file for a contact sheet of the rows, by default of "
            f"{decode_dataset.ON_A_SHEET} randomly chosen ones.",
            rich_help_panel=DATASET,
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWS",
            help="Rows to decode: 5, 0:100, -16: (the last 16) or 3,7. May be repeated. Tiles of images are "
            "then not joined.",
            rich_help_panel=DATASET,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of rows to decode, chosen randomly.", rich_help_panel=DATASET),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Random seed; the same seed chooses the same rows.", rich_help_panel=DATASET),
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """Reconstruct images from .qlip files (photo.qlip becomes DIR/photo.png) or from a dataset (DIR/KEY.png).

    Only the model that wrote a file can decode it; the file of another model is an error that names both. A dataset
    names its model, so --model is not needed. The tiles of an image in a dataset are joined to one file, or shown one
    by one with --rows or --sheet.
    """
    from qlip.cli import models
    from qlip.cli.outputs import enlarged, enlarged_size, png, write_new
    from qlip.tokens import TokenFile

    if any(decode_dataset.is_dataset(file) for file in files):
        if len(files) > 1:
            usage_error("give one dataset at a time, without .qlip files; `qlip tokens merge` joins several datasets")
        chosen = None if rows is None else ",".join(rows)
        request = decode_dataset.Request(output, sheet, chosen, limit, seed, original_size, overwrite, skip_existing)
        decode_dataset.decode_dataset(files[0], request, model, device, dtype, batch_size, as_json)
        return
    if sheet is not None or rows is not None or limit is not None:
        usage_error("--sheet, --rows and --limit need a dataset that `qlip tokenize` wrote")
    folder = output or Path(".")
    found = inputs.find(files, inputs.TOKEN_SUFFIXES, ".qlip file")
    codec = models.load(options.DEFAULT_MODEL if model is None else model, device, dtype)
    coders = codec.coders(tables)
    failures, results = Failures(), dict[inputs.Input, Row]()
    todo = [item for item in found if not (skip_existing and item.output(folder, ".png").exists())]

    def read(item: inputs.Input) -> TokenFile:
        tokens = TokenFile.load(item.path, coders)
        codec.check_decoder(tokens)
        try:
            codec.check_size(tokens, max_tokens)
        except QLIPError as error:
            raise QLIPError(f"{error} with --max-tokens {tokens.num_tokens}") from None
        return tokens

    def write(item: inputs.Input, tokens: TokenFile, image: Image.Image) -> None:
        sized = enlarged(image, tokens.original_size) if original_size else image
        write_new(item.output(folder, ".png"), png(sized), overwrite, folder=folder)

    with (
        stoppable("finished files are kept; run the same command with --skip-existing to continue"),
        progress("decoding", len(todo)) as bar,
        io_pipeline.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        loaded = io_pipeline.read_ahead(todo, read, failures)
        for batch in io_pipeline.in_batches(loaded, batch_size, lambda pair: (pair[1].grid, pair[1].tiles)):
            decoded = codec.decode_files([tokens for _, tokens in batch], batch_size)
            for (item, tokens), image in zip(batch, decoded, strict=True):
                results[item] = {
                    "input": str(item.path),
                    "output": str(item.output(folder, ".png")),
                    "size": list(enlarged_size(image, tokens.original_size) if original_size else image.size),
                    "original_size": list(tokens.original_size),
                    "file_bytes": item.path.stat().st_size,
                }
                writer.submit(item, lambda item=item, t=tokens, image=image: write(item, t, image))  # type: ignore[misc]

    columns: dict[str, Callable[[Row], str]] = {
        "tokens in": lambda row: row["input"],
        "image": lambda row: row["output"],
        "bytes": lambda row: f"{row['file_bytes']:,}",
        "size": lambda row: "{} x {}".format(*row["size"]),
    }
    report(codec, found, todo, results, failures, as_json, columns)
    failures.finish(len(found), "file")
