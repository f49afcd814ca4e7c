"""`qlip reconstruct`: images beside their reconstructions, with PSNR and bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, io_pipeline, options
from qlip.cli.console import (
    Failures,
    new_table,
    plural,
    print_json,
    print_table,
    progress,
    show,
    stoppable,
    usage_error,
)
from qlip.cli.image.encode import shown_ratio

if TYPE_CHECKING:
    from PIL import Image

    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.tokens import ImageCodec, Prepared, TokenFile

Row = dict[str, Any]

LARGEST_GRID = 48
"""Largest number of images in one grid."""


def reconstruct(
    images: options.Images,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|DIR",
            help="An image file for one grid of all images, or a folder (existing, or a name without suffix) for one "
            "comparison per image.",
        ),
    ] = Path("grid.png"),
    fit: options.FitOption = options.FitMode.square,
    tiles: options.Tiles = False,
    size: options.Size = None,
    overwrite: options.Overwrite = False,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Show images beside their reconstructions from tokens, with PSNR, bytes and compression ratio.

    PSNR compares the prepared 8-bit RGB image with the image decoded from its .qlip file. Bytes are those of the packed
    tokens; a .qlip file adds 92 for header and checksum. The ratio compares them with the image's own file, which may
    have more pixels than the model sees.
    """
    from qlip.cli import models, outputs
    from qlip.cli.image import contact_sheet
    from qlip.files import write_bytes

    found = inputs.find(images, inputs.IMAGES, "image")
    one_grid = _is_one_grid(output, len(found))
    codec = models.load(model, device, dtype)
    how = options.fit_of(fit, tiles, size, codec)
    failures = Failures()
    rows: dict[inputs.Input, Row] = {}
    exhibits: dict[inputs.Input, Exhibit] = {}

    def write(item: inputs.Input, exhibit: Exhibit) -> None:
        outputs.write_new(
            item.output(output, ".png"), outputs.png(contact_sheet.draw([exhibit])), overwrite, folder=output
        )

    with (
        stoppable("nothing was written" if one_grid else "finished comparisons are kept"),
        progress("reconstructing", len(found)) as bar,
        io_pipeline.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        stream = io_pipeline.read_ahead(found, lambda item: codec.prepare(item.path, how), failures)
        for batch in io_pipeline.in_batches(
            stream, 1 if how.mode == "tiles" else batch_size, lambda loaded: (loaded[1].image.size, loaded[1].tiles)
        ):
            pairs = codec.round_trip([prepared for _, prepared in batch], batch_size)
            for (item, original), (tokens, rebuilt) in zip(batch, pairs, strict=True):
                rows[item] = row = measure(item, original, rebuilt, tokens)
                exhibit = contact_sheet.comparison(original.image, rebuilt, item.name, caption(row))
                if one_grid:
                    exhibits[item] = exhibit
                    bar.advance()
                else:
                    row["output"] = str(item.output(output, ".png"))
                    writer.submit(item, lambda item=item, exhibit=exhibit: write(item, exhibit))  # type: ignore[misc]

    if exhibits:
        sheet = contact_sheet.draw([exhibits[item] for item in found if item in exhibits])
        write_bytes(output, outputs.image_file(output, sheet))
    failed = {failure["input"] for failure in failures.found}
    _report(
        codec,
        [rows[item] for item in found if item in rows and str(item.path) not in failed],
        output,
        failures,
        as_json,
    )
    failures.finish(len(found), "image")


def _is_one_grid(output: Path, count: int) -> bool:
    """Return whether all images go into one grid; refuse file names and counts that make none."""
    from qlip.cli.outputs import check_image_name

    if output.is_dir() or not output.suffix:
        return False
    check_image_name(output)
    if count > LARGEST_GRID:
        usage_error(
            f"{count} images are too many for one grid (at most {LARGEST_GRID}); name a folder: -o comparisons/"
        )
    return True


def measure(item: inputs.Input, prepared: Prepared, rebuilt: Image.Image, tokens: TokenFile) -> Row:
    """Return the report of one image: sizes, bytes of its tokens, and PSNR of the 8-bit images in dB."""
    from qlip.evaluation.metrics.pixel import image_psnr

    psnr, input_bytes = image_psnr(prepared.image, rebuilt), item.path.stat().st_size
    return {
        "input": str(item.path),
        "original_size": list(prepared.original_size),
        "size": list(prepared.image.size),
        "tiles": tokens.tiles[0] * tokens.tiles[1],
        "tokens": tokens.num_tokens,
        "input_bytes": input_bytes,
        "token_bytes": len(tokens.bits),
        "ratio": round(input_bytes / len(tokens.bits), 3),
        "psnr": round(psnr, 3) if math.isfinite(psnr) else None,  # None: all pixels are equal
    }


def caption(row: Row) -> str:
    """Return the report of one image as a line to print below it."""
    psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    sizes = f"{row['token_bytes']:,} bytes (its file: {row['input_bytes']:,})"
    return f"{psnr} · {sizes} · {row['size'][0]} x {row['size'][1]} px"


def _report(codec: ImageCodec, rows: list[Row], output: Path, failures: Failures, as_json: bool) -> None:
    if as_json:
        print_json({"model": codec.described(), "output": str(output), "results": rows, "failures": failures.found})
        return
    numbers = ("dB", "file bytes", "bytes", "ratio")
    table = new_table("image", *numbers, "pixels", numbers=numbers)
    for row in rows if len(rows) <= LARGEST_GRID else []:
        psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.2f}"
        sizes = (f"{size:,}" for size in (row["input_bytes"], row["token_bytes"]))
        table.add_row(row["input"], psnr, *sizes, shown_ratio(row["ratio"]), "{} x {}".format(*row["size"]))
    if table.rows:
        print_table(table)
    if rows:
        finite = [row["psnr"] for row in rows if row["psnr"] is not None]
        mean = f", {sum(finite) / len(finite):.2f} dB on average" if len(finite) > 1 else ""
        show(f"{plural(len(rows), 'image')} in {output}{mean}")
