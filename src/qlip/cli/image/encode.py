"""`qlip encode`: images to `.qlip` files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, io_pipeline, options
from qlip.cli.console import Failures, new_table, note, plural, print_json, print_table, progress, show, stoppable

if TYPE_CHECKING:
    from qlip.tokens import ImageCodec, TokenFile

Row = dict[str, Any]

MOST_LISTED = 20
"""Results in a table; more are summarised in one line."""


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
        typer.Option(
            "--entropy-code",
            help="Compress the tokens further with the model's entropy tables; decoding needs these tables.",
        ),
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    tables: options.EntropyTables = None,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Turn images into .qlip files: photo.jpg becomes DIR/photo.qlip, a few hundred bytes.

    A file that exists with other content is an error unless --overwrite is given. With --skip-existing, images whose
    file exists and was made by this model are skipped, so that a stopped command can be continued.

    The ratio compares the .qlip file with the image's own file, which may have more pixels than the model sees.
    """
    from qlip.cli import models

    found = inputs.find(images, inputs.IMAGES, "image")
    codec = models.load(model, device, dtype)
    how = options.fit_of(fit, tiles, size, codec)
    coder = codec.coder(tables) if entropy_code else None
    if entropy_code and coder is None:
        note(f"note: {codec.name} has no entropy tables, so bits stay raw; `qlip tokens codec train` makes tables")
    failures, rows = Failures(), dict[inputs.Input, Row]()
    todo = [item for item in found if not (skip_existing and _is_this_models(item.output(output, ".qlip"), codec))]

    def write(item: inputs.Input, content: bytes) -> None:
        from qlip.cli.outputs import write_new

        write_new(item.output(output, ".qlip"), content, overwrite, folder=output)

    with (
        stoppable("finished files are kept; run the same command with --skip-existing to continue"),
        progress("encoding", len(todo)) as bar,
        io_pipeline.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        loaded = io_pipeline.read_ahead(todo, lambda item: codec.prepare(item.path, how), failures)
        for batch in io_pipeline.in_batches(
            loaded, 1 if how.mode == "tiles" else batch_size, lambda pair: pair[1].image.size
        ):
            encoded = codec.encode_prepared([prepared for _, prepared in batch], batch_size)
            for (item, _), tokens in zip(batch, encoded, strict=True):
                content = tokens.to_bytes(coder)
                rows[item] = _row(item, output, tokens, content)
                writer.submit(item, lambda item=item, content=content: write(item, content))  # type: ignore[misc]

    columns: dict[str, Callable[[Row], str]] = {
        "image": lambda row: row["input"],
        "file bytes": lambda row: f"{row['input_bytes']:,}",
        "tokens in": lambda row: row["output"],
        "bytes": lambda row: f"{row['file_bytes']:,}",
        "grid": lambda row: "{} x {}".format(*row["grid"]),
        "ratio": lambda row: shown_ratio(row["ratio"]),
    }
    report(codec, found, todo, rows, failures, as_json, columns)
    failures.finish(len(found), "image")


def _is_this_models(path: Path, codec: ImageCodec) -> bool:
    from qlip import QLIPError
    from qlip.tokens.token_file import read_header

    try:
        return path.exists() and read_header(path).code_fingerprint.hex() == codec.model.code_fingerprint
    except QLIPError:
        return False  # unreadable: encode the image again and report that the file differs


def _row(item: inputs.Input, folder: Path, tokens: TokenFile, content: bytes) -> Row:
    input_bytes = item.path.stat().st_size
    token_bytes = len(tokens.bits) + len(content) - tokens.num_bytes
    return {
        "input": str(item.path),
        "output": str(item.output(folder, ".qlip")),
        "input_bytes": input_bytes,
        "original_size": list(tokens.original_size),
        "grid": list(tokens.grid),
        "tokens": tokens.num_tokens,
        "token_bytes": token_bytes,
        "file_bytes": len(content),
        "ratio": round(input_bytes / len(content), 3),
    }


def shown_ratio(ratio: float) -> str:
    """Format a ratio of sizes, such as ``12.5:1``, or ``0.18:1`` for what has grown."""
    return f"{ratio:.1f}:1" if ratio >= 1 else f"{ratio:.2f}:1"


def report(
    codec: ImageCodec,
    found: list[inputs.Input],
    todo: list[inputs.Input],
    rows: dict[inputs.Input, Row],
    failures: Failures,
    as_json: bool,
    columns: dict[str, Callable[[Row], str]],
) -> None:
    """Print the results of `qlip encode` or `qlip decode`: as JSON, as a table, or as one line if there are many."""
    failed = {failure["input"] for failure in failures.found}
    done = [rows[item] for item in found if item in rows and str(item.path) not in failed]
    skipped = len(found) - len(todo)
    if as_json:
        print_json({"model": codec.described(), "results": done, "skipped": skipped, "failures": failures.found})
        return
    if skipped:
        note(f"{plural(skipped, 'existing file')} skipped")
    if len(done) > MOST_LISTED:
        show(f"{plural(len(done), 'file')} written, {sum(row['file_bytes'] for row in done):,} bytes of tokens")
    elif done:
        table = new_table(*columns, numbers=("file bytes", "bytes", "ratio"))
        for row in done:
            table.add_row(*(cell(row) for cell in columns.values()))
        print_table(table)
