"""`qlip reconstruct`: what the tokens keep of an image, to look at and in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, options
from qlip.cli import io_pipeline as flow
from qlip.cli.console import Failures, new_table, plural, print_json, print_table, progress, stoppable, usage_error

if TYPE_CHECKING:
    from PIL import Image

    from qlip.cli.codec import Prepared
    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.cli.models import Tokenizer
    from qlip.tokens import TokenFile

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
    keep_aspect: options.KeepAspect = False,
    size: options.Size = None,
    tiles: Annotated[
        bool,
        typer.Option(
            "--tiles",
            help="Cut the picture, or with --size its middle at that size, into tiles of the model's own size.",
            rich_help_panel=options.SIZE_PANEL,
        ),
    ] = False,
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
    from qlip.cli import codec, models, outputs
    from qlip.cli.image import contact_sheet as pictures
    from qlip.files import write_bytes

    if tiles and keep_aspect:
        usage_error("--tiles keeps the shape of the picture anyway; leave out --keep-aspect")
    found = inputs.find(images, inputs.IMAGE_SUFFIXES, "picture")
    one_grid = _is_picture_name(output, len(found))
    tokenizer = models.load(model, device, dtype)
    fit = codec.Fit(size, keep_aspect)
    if not tiles:
        fit.check(tokenizer)
    failures = Failures()
    rows: dict[inputs.Input, Row] = {}
    exhibits: dict[inputs.Input, Exhibit] = {}

    def load(item: inputs.Input) -> Prepared:
        return (
            codec.prepare_for_tiles(tokenizer, item.path, size) if tiles else codec.prepare(tokenizer, item.path, fit)
        )

    def write(item: inputs.Input, exhibit: Exhibit) -> None:
        outputs.write_new(item.output(output, ".png"), outputs.png(pictures.draw([exhibit])), overwrite)

    with (
        stoppable("nothing was written" if one_grid else "finished comparisons are kept"),
        progress("rebuilding", len(found)) as bar,
        flow.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        stream = flow.read_ahead(found, load, failures)
        for batch in flow.in_batches(stream, 1 if tiles else batch_size, lambda loaded: loaded[1].image.size):
            for (item, picture), (files, rebuilt) in zip(
                batch, _rebuilt(tokenizer, batch, tiles, batch_size), strict=True
            ):
                rows[item] = row = figures(item, picture, rebuilt, files)
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
        tokenizer,
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


def _rebuilt(
    tokenizer: Tokenizer, batch: Sequence[tuple[inputs.Input, Prepared]], tiles: bool, batch_size: int
) -> list[tuple[list[TokenFile], Image.Image]]:
    """For each image its token files (one, or one a tile) and the image rebuilt from them."""
    from qlip.cli import codec

    if tiles:
        return [codec.there_and_back_in_tiles(tokenizer, picture, batch_size) for _, picture in batch]
    pairs = codec.there_and_back(tokenizer, [picture for _, picture in batch])
    return [([tokens], image) for tokens, image in pairs]


def figures(item: inputs.Input, picture: Prepared, rebuilt: Image.Image, files: Sequence[TokenFile]) -> Row:
    """Size and quality of one image's reconstruction."""
    from qlip.cli import codec

    token_bytes = sum(len(tokens.bits) for tokens in files)
    psnr = codec.psnr(picture.image, rebuilt)
    return {
        "input": str(item.path),
        "original_size": list(picture.original_size),
        "size": list(picture.image.size),
        "tiles": len(files),
        "tokens": sum(tokens.num_tokens for tokens in files),
        "token_bytes": token_bytes,
        "ratio": round(3 * picture.image.width * picture.image.height / token_bytes, 2),
        "psnr": round(psnr, 3) if math.isfinite(psnr) else None,  # None: equal in every pixel
    }


def caption(row: Row) -> str:
    """The figures in words, for an image's foot."""
    psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    return f"{psnr} · {row['token_bytes']:,} bytes · {row['ratio']:.0f}:1 · {row['size'][0]} x {row['size'][1]} px"


def _report(tokenizer: Tokenizer, rows: list[Row], output: Path, failures: Failures, as_json: bool) -> None:
    if as_json:
        print_json({"model": tokenizer.described(), "output": str(output), "results": rows, "failures": failures.found})
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
