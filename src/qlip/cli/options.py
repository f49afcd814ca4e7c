"""Options that several commands share, worded once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.assets import BUNDLED
from qlip.cli.console import usage_error
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.tokens import Fit, ImageCodec

MODEL_PANEL = "Model and machine"
SIZE_PANEL = "Preparation of the image"


class Dtype(StrEnum):
    """Types of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Pictures, folders (with subfolders) or patterns such as 'photos/*.jpg'."),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A checkpoint folder, a Hub id, the bundled model's name, or a published one such as QLIP-B-16-256.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Maker = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The model that made the dataset, where its name there does not lead to it.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the best there is.", rich_help_panel=MODEL_PANEL),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Type of the weights.", rich_help_panel=MODEL_PANEL)]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Pictures that go through the model at once.", rich_help_panel=MODEL_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Report as JSON on stdout.")]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results, made if absent.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files that differ.")]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Leave alone what is there already: to go on after a stop.")
]


class FitMode(StrEnum):
    """Ways to make an image fit the model."""

    square = "square"
    keep_aspect = "keep-aspect"
    tiles = "tiles"


FitOption = Annotated[
    FitMode,
    typer.Option(
        "--fit",
        help="square: the middle of the image. keep-aspect: all of it, on another grid. tiles: all of it, cut into "
        "tiles of the model's size, so that it keeps its detail.",
        rich_help_panel=SIZE_PANEL,
    ),
]
Tiles = Annotated[
    bool, typer.Option("--tiles", help="Short for --fit tiles.", rich_help_panel=SIZE_PANEL, show_default=False)
]
Size = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="H W",
        help="Height and width in pixels to work at, multiples of the patch: larger keeps more, in more tokens.",
        rich_help_panel=SIZE_PANEL,
    ),
]

Tables = Annotated[
    Path | None,
    typer.Option(
        "--entropy-tables",
        metavar="FILE",
        help="Entropy tables other than the model's own.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]


def fit_of(mode: FitMode, tiles: bool, size: tuple[int, int] | None, codec: ImageCodec) -> Fit:
    """Combine --fit, --tiles and --size; a size that does not fit the model is a usage error."""
    from qlip.tokens import Fit

    if tiles and mode is FitMode.keep_aspect:
        usage_error("--tiles and --fit keep-aspect exclude each other; give one")
    fit = Fit("tiles" if tiles else mode.value, size)
    try:
        fit.check(codec.processor.preprocessing)
    except QLIPError as error:
        usage_error(f"--{error}")
    return fit


DEFAULT_MODEL = BUNDLED
AUTO = "auto"
"""The device that is taken where none is named."""
