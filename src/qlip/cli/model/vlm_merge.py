"""`qlip vlm merge`: a run of the task vlm as one folder."""

from __future__ import annotations

from typing import Annotated

import typer

from qlip.cli import options
from qlip.cli.console import print_json, show


def merge(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder of a run of the task vlm, of one of its checkpoints, or of a model."
        ),
    ],
    output: options.Folder,
    dtype: Annotated[
        options.Dtype, typer.Option("--dtype", help="Data type of the stored weights.")
    ] = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Write one folder that holds the whole text decoder: adapters, if it has any, are added to it.

    A run of stage 1 or with LoRA stores the projector and the adapters alone, and names the text decoder's folder. The
    merged folder needs that folder no longer; qlip chat --model reads both.
    """
    import torch

    from qlip.vlm.merge import merge as merge_run

    source = merge_run(run, output, getattr(torch, dtype.value))
    size = (output / "model.safetensors").stat().st_size
    if as_json:
        print_json({"source": str(source), "output": str(output), "bytes": size})
    else:
        show(f"{output}: {source}, with its text decoder, {size:,} bytes")
