"""`qlip convert`: build a checkpoint from pretrained towers, or a decoder from a file of LlamaGen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, print_json, print_table, show, usage_error
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.modeling.convert import Report

SIZES = "Sizes for --config auto"
DECODER = "Decoders of image tokens"
OF_LLAMAGEN = ("--llamagen", "--heads", "--grid", "--output", "--json")
"""Options that converting LlamaGen's decoder reads."""


def convert(
    context: typer.Context,
    output: options.Folder,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Image tower: a .safetensors or .pt file of EVA-02 or EVA-CLIP, or a QLIP checkpoint folder.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Text tower: a file of EVA-CLIP or OpenCLIP, which may be the same one, or a QLIP checkpoint folder.",
        ),
    ] = None,
    config: Annotated[
        str,
        typer.Option(help="Config: a published name such as QLIP-B-16-256, a config.json, or auto (from the source)."),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Vocabulary: CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt.",
        ),
    ] = None,
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            "--quick-gelu/--no-quick-gelu",
            help="Activation of a CLIP text tower, which no file says: QuickGELU for OpenAI's, DFN's and MetaCLIP's.",
            show_default="QuickGELU for OpenAI's own files",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the newly initialised parts.")] = 0,
    fold_normalization: Annotated[
        bool,
        typer.Option(
            "--fold-normalization",
            help="Move the normalisation of pixels into the patch embedding: alpha_r then weighs as from scratch.",
        ),
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels per image side.", show_default="the source's grid of patches", rich_help_panel=SIZES
        ),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels per patch side.", show_default="the source's", rich_help_panel=SIZES),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, help="Bits per token.", show_default="28", rich_help_panel=SIZES)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Bits per group.", show_default="7", rich_help_panel=SIZES)
    ] = None,
    llamagen: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of LlamaGen's decoder, such as t2i_XL_stage1_256.pt, to become a decoder's folder instead.",
            rich_help_panel=DECODER,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attention heads of LlamaGen's decoder.",
            show_default="those of its size",
            rich_help_panel=DECODER,
        ),
    ] = None,
    grid: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="ROWS COLUMNS",
            help="Grid of tokens of LlamaGen's decoder, such as 24 24 for images of 384 pixels.",
            show_default="as the file says, else 16 16",
            rich_help_panel=DECODER,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Build a model from pretrained towers, to train in about a tenth of the steps.

    The bottleneck and the decoder start from random weights. A table lists the source and the target of every tensor.
    With --llamagen the result is a decoder of image tokens with LlamaGen's weights.
    """
    if llamagen is not None:
        _llamagen(context, llamagen, output, heads, grid, as_json)
        return
    for name, value in (("heads", heads), ("grid", grid)):
        if value is not None:
            usage_error(f"--{name} is for --llamagen; leave it out")
    from qlip.modeling.convert import Sizes
    from qlip.modeling.convert import convert as build

    if vision is None and text is None:
        usage_error("nothing to convert: give --vision, --text, or both, or --llamagen")
    for source in (vision, text):
        if source is not None and Path(source).expanduser().resolve() == output.expanduser().resolve():
            usage_error(f"{source}: is both source and --output; choose another folder")
    made = build(
        vision,
        text,
        config=config,
        sizes=Sizes(image_size, patch_size, bits, group_size),
        tokenizer=tokenizer,
        quick_gelu=quick_gelu,
        seed=seed,
        fold_normalization=fold_normalization,
    )
    made.save(output)
    files = sorted(str(path) for path in output.iterdir() if path.is_file())
    if as_json:
        print_json({"output": str(output), "files": files, **made.report.to_dict()})
        return
    _show(made.report)
    for file in files:
        show(file)


def _llamagen(
    context: typer.Context,
    file: Path,
    output: Path,
    heads: int | None,
    grid: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Convert a file of LlamaGen's to a decoder's folder."""
    from qlip.lm.llamagen import read_llamagen

    if unread := [name for name in options.given(context) if name not in OF_LLAMAGEN]:
        usage_error(f"--llamagen converts a decoder, without towers; leave out {', '.join(unread)}")
    if grid is not None and min(grid) < 1:
        usage_error(f"--grid {grid[0]} {grid[1]}: give the rows and columns of tokens")
    try:
        found = read_llamagen(file, heads=heads, grid=grid)
    except QLIPError as error:
        raise QLIPError(f"{error} (--heads N)" if "number of heads" in str(error) else str(error)) from None
    found.model.save_pretrained(output)
    files = [str(output / name) for name in ("config.json", "model.safetensors")]
    if as_json:
        print_json({"output": str(output), "files": files, "notes": found.notes})
        return
    for line in found.notes:
        note(f"{line}; --grid ROWS COLUMNS gives another")
    for path in files:
        show(path)


def _show(report: Report) -> None:
    """Print the recognised formats, the notes and the table."""
    for source in report.sources:
        note(f"{source.part}: {source.file}: {source.layout}")
    for line in report.notes:
        note(line)
    table = new_table("status", "source", "target", "tensors", "method", numbers=("tensors",))
    for row in report.table():
        table.add_row(row["status"], row["source"], row["target"], row["tensors"], row["how"])
    print_table(table)
    counts = report.counts()
    show(", ".join(f"{count:,} {status}" for status, count in counts.items()))
