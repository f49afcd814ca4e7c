"""Options that several commands share, worded once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlip.assets import BUNDLED

MODEL_PANEL = "Model and machine"
SIZE_PANEL = "How the picture is prepared"


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
KeepAspect = Annotated[
    bool,
    typer.Option("--keep-aspect", help="Keep the whole picture, not its middle square.", rich_help_panel=SIZE_PANEL),
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
        "--tables",
        metavar="FILE",
        help="Entropy tables other than the model's own.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]

DEFAULT_MODEL = BUNDLED
AUTO = "auto"
"""The device that is taken where none is named."""
