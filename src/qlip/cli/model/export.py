"""`qlip export`: write a checkpoint in another precision, or ONNX graphs that run without this package."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from qlip.cli import options
from qlip.cli.console import plural, print_json, show, usage_error


class Format(StrEnum):
    """File format of the export."""

    safetensors = "safetensors"
    onnx = "onnx"


def export(
    output: options.Folder,
    format: Annotated[
        Format,
        typer.Option(
            help="Output format: a checkpoint folder, or encode.onnx and decode.onnx for the trained size (float32)."
        ),
    ] = Format.safetensors,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: Annotated[
        options.Dtype, typer.Option("--dtype", help="Data type of the stored weights.")
    ] = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Write a model to publish or deploy: in another precision, or as ONNX.

    The output holds the files that users need, without a training run's optimizer state and logs.
    """
    import torch

    from qlip.cli import models
    from qlip.data.sources.training_text import UNKNOWN, TrainingText
    from qlip.files import folder_written_aside
    from qlip.modeling.export import export_onnx, require_packages

    if format is Format.onnx and dtype is not options.Dtype.float32:
        usage_error(f"--dtype {dtype.value}: ONNX is written in float32; leave it out")
    if format is Format.onnx:
        require_packages()
    codec = models.load(model, "cpu")
    if format is Format.onnx:
        written = export_onnx(codec.model, output)
    else:
        with folder_written_aside(output) as aside:
            codec.model.save_pretrained(aside, getattr(torch, dtype.value))
            codec.processor.save_pretrained(aside)
            if (text := TrainingText.read(model)) is not UNKNOWN:
                text.save(aside)
        written = sorted(path for path in output.iterdir() if path.is_file())
    sizes = {str(path): path.stat().st_size for path in written}
    if as_json:
        print_json({"model": codec.described(), "output": str(output), "files": sizes})
    else:
        names = ", ".join(path.name for path in written)
        show(f"{plural(len(written), 'file')} in {output}, {sum(sizes.values()):,} bytes: {names}")
