"""`qlip encode` and `qlip decode`: images to `.qlip` files and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, options
from qlip.cli import io_pipeline as flow
from qlip.cli.console import (
    Failures,
    new_table,
    note,
    plural,
    print_json,
    print_table,
    progress,
    stoppable,
    usage_error,
)

if TYPE_CHECKING:
    from PIL import Image

    from qlip.tokens import ImageCodec, Prepared, TokenFile

Row = dict[str, Any]

DATASET = "Of a dataset"

SHOWN = 20
"""More results than this are summed up instead of listed."""


def encode(
    images: options.Images,
    output: options.Folder = Path("."),
    fit: options.FitOption = options.FitMode.square,
    tiles: options.Tiles = False,
    size: options.Size = None,
    overwrite: options.Overwrite = False,
    skip_existing: options.SkipExisting = False,
    entropy_code: Annotated[
        bool,
        typer.Option("--entropy-code", help="Fewer bytes, where the tokens allow; reading them needs the same model."),
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    tables: options.Tables = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Turn images into .qlip files: photo.jpg becomes DIR/photo.qlip, a few hundred bytes.

    A file that exists with other content is refused unless --overwrite is given. With --skip-existing, images whose
    file exists and is this model's are left out, so that a run that was stopped goes on where it was.
    """
    from qlip.cli import models

    found = inputs.find(images, inputs.IMAGE_SUFFIXES, "image")
    codec = models.load(model, device, dtype)
    how = options.fit_of(fit, tiles, size, codec)
    coder = codec.coder(tables) if entropy_code else None
    if entropy_code and coder is None:
        note(f"note: {codec.name} has no entropy tables, the bits stay raw; `qlip tokens codec train` makes them")
    failures, rows = Failures(), dict[inputs.Input, Row]()
    todo = [item for item in found if not (skip_existing and _is_this_models(item.output(output, ".qlip"), codec))]

    def write(item: inputs.Input, content: bytes) -> None:
        from qlip.cli.outputs import write_new

        write_new(item.output(output, ".qlip"), content, overwrite)

    with (
        stoppable("finished files are kept; the same command with --skip-existing goes on"),
        progress("encoding", len(todo)) as bar,
        flow.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        prepared = flow.read_ahead(todo, lambda item: codec.prepare(item.path, how), failures)
        for batch in flow.in_batches(prepared, 1 if how.mode == "tiles" else batch_size, _shape):
            for (item, picture), tokens in zip(
                batch, codec.encode_prepared([p for _, p in batch], batch_size), strict=True
            ):
                content = tokens.to_bytes(coder)
                rows[item] = _encoded(item, output, picture, tokens, content)
                writer.submit(item, lambda item=item, content=content: write(item, content))  # type: ignore[misc]

    columns: dict[str, Callable[[Row], str]] = {
        "picture": lambda row: row["input"],
        "tokens in": lambda row: row["output"],
        "bytes": lambda row: f"{row['file_bytes']:,}",
        "grid": lambda row: "{} x {}".format(*row["grid"]),
        "ratio": lambda row: f"{row['ratio']:.1f}:1",
    }
    _report(codec, found, todo, rows, failures, as_json, columns)
    failures.finish(len(found), "picture")


def _shape(loaded: tuple[inputs.Input, Prepared]) -> tuple[int, int]:
    return loaded[1].image.size


def _layout(loaded: tuple[inputs.Input, TokenFile]) -> tuple[tuple[int, int], tuple[int, int]]:
    return loaded[1].grid, loaded[1].tiles


def _is_this_models(path: Path, codec: ImageCodec) -> bool:
    from qlip import QLIPError
    from qlip.tokens.token_file import read_header

    try:
        return path.exists() and read_header(path).code_fingerprint.hex() == codec.model.code_fingerprint
    except QLIPError:
        return False  # it cannot be read: encode the image again, and say that the file differs


def _encoded(item: inputs.Input, folder: Path, picture: Prepared, tokens: TokenFile, content: bytes) -> Row:
    seen = 3 * picture.image.width * picture.image.height
    payload = len(tokens.bits) + len(content) - tokens.num_bytes
    return {
        "input": str(item.path),
        "output": str(item.output(folder, ".qlip")),
        "original_size": list(tokens.original_size),
        "grid": list(tokens.grid),
        "tokens": tokens.num_tokens,
        "token_bytes": payload,
        "file_bytes": len(content),
        "ratio": round(seen / payload, 2),
    }


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
            help="Folder for the results, made if absent; of .qlip files this one.",
            show_default=False,
        ),
    ] = None,
    original_size: Annotated[
        bool, typer.Option("--original-size", help="Enlarge to the size that the encoded part had in the original.")
    ] = False,
    overwrite: options.Overwrite = False,
    skip_existing: options.SkipExisting = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"The model that made them: a checkpoint folder, a Hub id, a name; {options.DEFAULT_MODEL} by default,"
            " or the one that a dataset names.",
            rich_help_panel=options.MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    tables: options.Tables = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Pictures side by side in one, some by chance by default.", rich_help_panel=DATASET
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--rows", metavar="ROWS", help="Which: 5, 0:100, -16: (the last), 3,7.", rich_help_panel=DATASET),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So many of them, by chance.", rich_help_panel=DATASET)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the chance.", rich_help_panel=DATASET)] = 0,
    as_json: options.Json = False,
) -> None:
    """Rebuild images from .qlip files: photo.qlip becomes DIR/photo.png. Or from a dataset: each key DIR/KEY.png.

    Only the model that wrote a file can rebuild it; another one's file is refused, naming both. A dataset names its
    model, so --model is not needed.
    """
    from qlip.cli import models
    from qlip.cli.image import decode_dataset as rebuild
    from qlip.tokens import TokenFile

    if any(rebuild.is_dataset(file) for file in files):
        if len(files) > 1:
            usage_error("give one dataset at a time, and no .qlip files with it; `qlip tokens merge` makes one of many")
        wanted = rebuild.Wanted(output, sheet, only, sample, seed, original_size, overwrite, skip_existing)
        rebuild.decode_dataset(files[0], wanted, model, device, dtype, batch_size, as_json)
        return
    if sheet is not None or only is not None or sample is not None:
        usage_error("--sheet, --rows and --sample go with a dataset that `qlip tokenize` wrote")
    output = output or Path(".")
    found = inputs.find(files, inputs.TOKEN_SUFFIXES, ".qlip file")
    codec = models.load(options.DEFAULT_MODEL if model is None else model, device, dtype)
    coders = codec.coders(tables)
    failures, rows = Failures(), dict[inputs.Input, Row]()
    todo = [item for item in found if not (skip_existing and item.output(output, ".png").exists())]

    def read(item: inputs.Input) -> TokenFile:
        tokens = TokenFile.load(item.path, coders)
        codec.check_decoder(tokens)
        return tokens

    def write(item: inputs.Input, tokens: TokenFile, image: Image.Image) -> None:
        from qlip.cli.outputs import png, write_new

        shown = enlarged(image, tokens.original_size) if original_size else image
        write_new(item.output(output, ".png"), png(shown), overwrite)

    with (
        stoppable("finished files are kept; the same command with --skip-existing goes on"),
        progress("decoding", len(todo)) as bar,
        flow.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        for batch in flow.in_batches(flow.read_ahead(todo, read, failures), batch_size, _layout):
            for (item, tokens), image in zip(batch, codec.decode_files([t for _, t in batch], batch_size), strict=True):
                rows[item] = {
                    "input": str(item.path),
                    "output": str(item.output(output, ".png")),
                    "size": list(_enlarged_size(image, tokens.original_size) if original_size else image.size),
                    "original_size": list(tokens.original_size),
                    "file_bytes": item.path.stat().st_size,
                }
                writer.submit(item, lambda item=item, t=tokens, image=image: write(item, t, image))  # type: ignore[misc]

    columns: dict[str, Callable[[Row], str]] = {
        "tokens in": lambda row: row["input"],
        "picture": lambda row: row["output"],
        "bytes": lambda row: f"{row['file_bytes']:,}",
        "size": lambda row: "{} x {}".format(*row["size"]),
    }
    _report(codec, found, todo, rows, failures, as_json, columns)
    failures.finish(len(found), "file")


def _enlarged_size(image: Image.Image, original_size: tuple[int, int]) -> tuple[int, int]:
    """How large the part that was encoded was in the original, whose shape need not be the grid's."""
    scale = min(original / now for original, now in zip(original_size, image.size, strict=True))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def enlarged(image: Image.Image, original_size: tuple[int, int]) -> Image.Image:
    """A rebuilt image as large as its part was in the original, whose (width, height) is given."""
    from PIL import Image

    return image.resize(_enlarged_size(image, original_size), Image.Resampling.BICUBIC)


def _report(
    codec: ImageCodec,
    found: list[inputs.Input],
    todo: list[inputs.Input],
    rows: dict[inputs.Input, Row],
    failures: Failures,
    as_json: bool,
    columns: dict[str, Callable[[Row], str]],
) -> None:
    """What was done: as JSON, as a table, or, for many, as one line."""
    failed = {failure["input"] for failure in failures.found}
    done = [rows[item] for item in found if item in rows and str(item.path) not in failed]
    skipped = len(found) - len(todo)
    if as_json:
        print_json({"model": codec.described(), "results": done, "skipped": skipped, "failures": failures.found})
        return
    if skipped:
        note(f"{plural(skipped, 'file')} there already, skipped")
    if len(done) > SHOWN:
        print(f"{plural(len(done), 'file')} written, {sum(row['file_bytes'] for row in done):,} bytes of tokens")
    elif done:
        table = new_table(*columns, numbers=("bytes", "ratio"))
        for row in done:
            table.add_row(*(cell(row) for cell in columns.values()))
        print_table(table)
