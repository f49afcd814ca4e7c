"""Options that several commands share, worded once."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlip.assets import BUNDLED
from qlip.cli.console import usage_error
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.tokens import Fit, ImageCodec

MODEL_PANEL = "Model and machine"
SIZE_PANEL = "Preparation of the image"

DEFAULT_MODEL = BUNDLED
AUTO = "auto"
"""Value of --device that takes the best device of this machine."""


class Dtype(StrEnum):
    """Data types of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...", help="Image files, folders (with subfolders) or patterns such as 'photos/*.jpg'."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Model: a checkpoint folder, a Hub id, the bundled model's name, or a published name such as "
        "QLIP-B-16-256.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DatasetModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Path of the model that made the dataset, if the name stored in the dataset no longer resolves.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device of the model: cpu, cuda, cuda:1 or mps; auto takes the best one of this machine.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Data type of the model's weights.", rich_help_panel=MODEL_PANEL)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch of the model.", rich_help_panel=MODEL_PANEL)]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Folder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results, created if absent.")
]
Seed = Annotated[int, typer.Option(help="Random seed; the same seed draws the same samples.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files that differ.")]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing", help="Skip inputs whose result exists, to continue a stopped command.")
]
EntropyTables = Annotated[
    Path | None,
    typer.Option(
        "--entropy-tables",
        metavar="FILE",
        help="File of entropy tables, instead of those in the model's folder.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
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
        help="How an image is made to fit the model. square: its centre crop. keep-aspect: the whole image, on a grid "
        "of its shape. tiles: the whole image, cut into tiles of the model's size, which keeps more detail.",
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
        help="Height and width of the prepared image in pixels, multiples of the patch size; a larger size keeps more "
        "detail in more tokens.",
        rich_help_panel=SIZE_PANEL,
    ),
]


def fit_mode(mode: FitMode, tiles: bool) -> Literal["square", "keep-aspect", "tiles"]:
    """Combine --fit and --tiles."""
    if tiles and mode is FitMode.keep_aspect:
        usage_error("--tiles and --fit keep-aspect exclude each other; give one")
    return "tiles" if tiles else mode.value


def fit_of(mode: FitMode, tiles: bool, size: tuple[int, int] | None, codec: ImageCodec) -> Fit:
    """Combine --fit, --tiles and --size; a size that does not fit the model is a usage error."""
    from qlip.tokens import Fit

    fit = Fit(fit_mode(mode, tiles), size)
    try:
        fit.check(codec.processor.preprocessing)
    except QLIPError as error:
        usage_error(f"--{error}")
    return fit


def split_list(values: Iterable[str] | None) -> list[str]:
    """Values of an option that may be repeated, given several values separated by commas, or both; each value once."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def given(context: typer.Context) -> list[str]:
    """Options given on the command line, by their first names."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            found.append(parameter.opts[0])
    return found
