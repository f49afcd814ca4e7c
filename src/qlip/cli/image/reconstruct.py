"""`qlip reconstruct`: what the tokens keep of an image, to look at and in figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, options
from qlip.cli import io_pipeline as flow
from qlip.cli.console import Failures, new_table, plural, print_json, print_table, progress, stoppable, usage_error

if TYPE_CHECKING:
    from PIL import Image

    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.tokens import ImageCodec, Prepared, TokenFile

Row = dict[str, Any]

LARGEST_GRID = 48
"""More images than this make no grid that one looks at."""


def reconstruct(
    images: options.Images,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|DIR",
            help="A picture file: one grid of all. A folder (no ending, or there already): one comparison a picture.",
        ),
    ] = Path("grid.png"),
    fit: options.FitOption = options.FitMode.square,
    tiles: options.Tiles = False,
    size: options.Size = None,
    overwrite: options.Overwrite = False,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Show images beside what is rebuilt from their tokens, with PSNR, bytes and ratio.

    The figures compare the 8-bit RGB image that the model saw with the one rebuilt from the bytes of its .qlip file.
    Bytes are the packed tokens'; a file adds 92 for header and checksum. The ratio is to 3 bytes a pixel.
    """
    from qlip.cli import models, outputs
    from qlip.cli.image import contact_sheet as pictures
    from qlip.files import write_bytes

    found = inputs.find(images, inputs.IMAGE_SUFFIXES, "picture")
    one_grid = _is_picture_name(output, len(found))
    codec = models.load(model, device, dtype)
    how = options.fit_of(fit, tiles, size, codec)
    failures = Failures()
    rows: dict[inputs.Input, Row] = {}
    exhibits: dict[inputs.Input, Exhibit] = {}

    def write(item: inputs.Input, exhibit: Exhibit) -> None:
        outputs.write_new(item.output(output, ".png"), outputs.png(pictures.draw([exhibit])), overwrite)

    with (
        stoppable("nothing was written" if one_grid else "finished comparisons are kept"),
        progress("rebuilding", len(found)) as bar,
        flow.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        stream = flow.read_ahead(found, lambda item: codec.prepare(item.path, how), failures)
        for batch in flow.in_batches(
            stream, 1 if how.mode == "tiles" else batch_size, lambda loaded: (loaded[1].image.size, loaded[1].tiles)
        ):
            pairs = codec.round_trip([prepared for _, prepared in batch], batch_size)
            for (item, picture), (tokens, rebuilt) in zip(batch, pairs, strict=True):
                rows[item] = row = figures(item, picture, rebuilt, tokens)
                exhibit = pictures.comparison(picture.image, rebuilt, item.name, caption(row))
                if one_grid:
                    exhibits[item] = exhibit
                    bar.advance()
                else:
                    row["output"] = str(item.output(output, ".png"))
                    writer.submit(item, lambda item=item, exhibit=exhibit: write(item, exhibit))  # type: ignore[misc]

    if exhibits:
        sheet = pictures.draw([exhibits[item] for item in found if item in exhibits])
        write_bytes(output, outputs.picture_file(output, sheet))
    failed = {failure["input"] for failure in failures.found}
    _report(
        codec,
        [rows[item] for item in found if item in rows and str(item.path) not in failed],
        output,
        failures,
        as_json,
    )
    failures.finish(len(found), "picture")


def _is_picture_name(output: Path, count: int) -> bool:
    """Whether all goes into one image; refuses names and numbers that make none."""
    from qlip.cli.outputs import check_picture_name

    if output.is_dir() or not output.suffix:
        return False
    check_picture_name(output)
    if count > LARGEST_GRID:
        usage_error(
            f"{count} pictures are too many for one grid ({LARGEST_GRID}); name a folder instead: -o comparisons/"
        )
    return True


def figures(item: inputs.Input, prepared: Prepared, rebuilt: Image.Image, tokens: TokenFile) -> Row:
    """Report of one image: sizes, bytes of its tokens, and PSNR of the 8-bit images, in dB."""
    from qlip.evaluation.metrics.pixel import image_psnr

    psnr = image_psnr(prepared.image, rebuilt)
    return {
        "input": str(item.path),
        "original_size": list(prepared.original_size),
        "size": list(prepared.image.size),
        "tiles": tokens.tiles[0] * tokens.tiles[1],
        "tokens": tokens.num_tokens,
        "token_bytes": len(tokens.bits),
        "ratio": round(3 * prepared.image.width * prepared.image.height / len(tokens.bits), 2),
        "psnr": round(psnr, 3) if math.isfinite(psnr) else None,  # None: equal in every pixel
    }


def caption(row: Row) -> str:
    """The figures in words, for an image's foot."""
    psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    return f"{psnr} · {row['token_bytes']:,} bytes · {row['ratio']:.0f}:1 · {row['size'][0]} x {row['size'][1]} px"


def _report(codec: ImageCodec, rows: list[Row], output: Path, failures: Failures, as_json: bool) -> None:
    if as_json:
        print_json({"model": codec.described(), "output": str(output), "results": rows, "failures": failures.found})
        return
    table = new_table("picture", "dB", "bytes", "ratio", "pixels", numbers=("dB", "bytes", "ratio"))
    for row in rows if len(rows) <= LARGEST_GRID else []:
        psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.2f}"
        table.add_row(
            row["input"], psnr, f"{row['token_bytes']:,}", f"{row['ratio']:.1f}:1", "{} x {}".format(*row["size"])
        )
    if table.rows:
        print_table(table)
    if rows:
        finite = [row["psnr"] for row in rows if row["psnr"] is not None]
        mean = f", {sum(finite) / len(finite):.2f} dB on average" if len(finite) > 1 else ""
        print(f"{plural(len(rows), 'picture')} in {output}{mean}")
