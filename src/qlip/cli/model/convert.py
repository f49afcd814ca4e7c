"""`qlip convert`: a checkpoint that starts from pretrained towers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, print_json, print_table, usage_error

if TYPE_CHECKING:
    from qlip.modeling.convert import Report

SIZES = "With --config auto"


def convert(
    output: options.Folder,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Image tower: a .safetensors or .pt file of EVA-02 or EVA-CLIP (or of a whole CLIP), or a QLIP"
            " checkpoint folder.",
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
        typer.Option(help="A published config such as QLIP-B-16-256, a config.json, or auto: built from the source."),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="CLIP's bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt."
        ),
    ] = None,
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            "--quick-gelu/--no-quick-gelu",
            help="The activation of CLIP towers, which no file says: QuickGELU for OpenAI's, DFN's and MetaCLIP's.",
            show_default="QuickGELU for OpenAI's own files",
        ),
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Drop what a QLIP has no place for, such as OpenCLIP's first norm.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the parts that start at random.")] = 0,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels along a side.", show_default="the source's grid of patches", rich_help_panel=SIZES
        ),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels along a patch.", show_default="the source's", rich_help_panel=SIZES),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, help="Bits a token.", show_default="28", rich_help_panel=SIZES)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Bits a group.", show_default="7", rich_help_panel=SIZES)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Start a model from pretrained towers instead of from nothing: training is about ten times shorter.

    What the towers do not hold (bottleneck, decoder) is random. A table says what became of every tensor; nothing is
    left out silently.
    """
    from qlip.modeling.convert import Sizes
    from qlip.modeling.convert import convert as start_from

    if vision is None and text is None:
        usage_error("nothing to convert: give --vision, --text, or both")
    for source in (vision, text):
        if source is not None and Path(source).expanduser().resolve() == output.expanduser().resolve():
            usage_error(f"{source}: is both source and --output; choose another folder")
    made = start_from(
        vision,
        text,
        config=config,
        sizes=Sizes(image_size, patch_size, bits, group_size),
        tokenizer=tokenizer,
        quick_gelu=quick_gelu,
        approximate=approximate,
        seed=seed,
    )
    made.save(output)
    files = sorted(str(path) for path in output.iterdir() if path.is_file())
    if as_json:
        print_json({"output": str(output), "files": files, **made.report.to_dict()})
        return
    show(made.report)
    for file in files:
        print(file)


def show(report: Report) -> None:
    """What was recognised and assumed, and the table."""
    for source in report.sources:
        note(f"{source.part}: {source.file}: {source.layout}")
    for line in report.notes:
        note(line)
    table = new_table("status", "source", "becomes", "tensors", "how", numbers=("tensors",))
    for row in report.table():
        table.add_row(row["status"], row["source"], row["target"], row["tensors"], row["how"])
    print_table(table)
    counts = report.counts()
    print(", ".join(f"{count:,} {status}" for status, count in counts.items()))
