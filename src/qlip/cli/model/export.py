"""`qlip export`: write a checkpoint in another precision, or in a form that runs without this package."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from qlip.cli import options
from qlip.cli.console import plural, print_json, show, usage_error
from qlip.errors import QLIPError


class Format(StrEnum):
    """File format of the export."""

    safetensors = "safetensors"
    onnx = "onnx"
    transformers = "transformers"
    llama = "llama"
    qwen3 = "qwen3"
    csm = "csm"
    diffusers = "diffusers"


OF_TOKENIZERS = (Format.safetensors, Format.onnx, Format.transformers)
OF_UM3 = (Format.safetensors, Format.transformers)
OF_DECODERS = (Format.safetensors, Format.llama, Format.qwen3, Format.csm, Format.diffusers)


def export(
    output: options.Folder,
    format: Annotated[
        Format,
        typer.Option(
            help="Output format. safetensors: a checkpoint folder. onnx: encode.onnx and decode.onnx of a tokenizer, "
            "for its trained size (float32). transformers: a tokenizer as a folder that transformers loads "
            "by itself with trust_remote_code=True, or a UM3; see --llava. llama, qwen3, csm: a decoder of image "
            "tokens as a folder of that architecture, which transformers loads by itself; csm is for depth heads, "
            "qwen3 for normalised queries. "
            "diffusers: a drawer as a folder that DiffusionPipeline.from_pretrained loads, with its tokenizer."
        ),
    ] = Format.safetensors,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: Annotated[
        options.Dtype, typer.Option("--dtype", help="Data type of the stored weights.")
    ] = options.Dtype.float32,
    llava: Annotated[
        str | None,
        typer.Option(
            "--llava",
            metavar="FOLDER",
            help="With --format transformers: write a LLaVA, which answers questions about images. FOLDER is a model of"
            " qlip.vlm, written with its trained weights, or a text decoder (Llama, Qwen, ...; also a Hub id), which "
            "gets the tokenizer's encoder and a new projector, to be trained.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="With --llava: file with a Jinja chat template, in place of the text decoder's own.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a model to publish or deploy: in another precision, as ONNX, or for transformers or diffusers.

    The output holds the files that users need, without a training run's optimizer state and logs.
    """
    from qlip.lm.config import is_decoder
    from qlip.modeling.checkpoint import resolve
    from qlip.um3.config import is_um3

    if format is Format.onnx and dtype is not options.Dtype.float32:
        usage_error(f"--dtype {dtype.value}: ONNX is written in float32; leave it out")
    if llava is not None and format is not Format.transformers:
        usage_error("--llava: add --format transformers")
    if chat_template is not None and llava is None:
        usage_error("--chat-template is for --llava")
    folder = resolve(model)
    um3, decoder = is_um3(folder), is_decoder(folder)
    if um3 and llava is not None:
        usage_error(f"--llava: {model} is a UM3, and no tokenizer; give a tokenizer with --model")
    if format not in (known := OF_UM3 if um3 else OF_DECODERS if decoder else OF_TOKENIZERS):
        kind = "a UM3" if um3 else "a decoder of image tokens" if decoder else "no decoder of image tokens"
        usage_error(f"--format {format.value}: {model} is {kind}; its formats are {', '.join(known)}")
    if llava is not None:
        described, written = _llava(model, llava, output, dtype, chat_template)
    elif um3:
        described, written = _um3(model, format, output, dtype)
    else:
        described, written = (_decoder if decoder else _tokenizer)(model, format, output, dtype)
    sizes = {str(path): path.stat().st_size for path in written}
    if as_json:
        print_json({"model": described, "output": str(output), "files": sizes})
    else:
        names = ", ".join(str(path.relative_to(output)) for path in written)
        show(f"{plural(len(written), 'file')} in {output}, {sum(sizes.values()):,} bytes: {names}")
        if described.get("projector") == "new":
            show("its projector is new (random): train it, before that answers do not depend on the image")


def _um3(model: str, format: Format, output: Path, dtype: options.Dtype) -> tuple[dict[str, Any], list[Path]]:
    """Write a UM3; return its description and the files."""
    import torch

    from qlip.errors import require
    from qlip.files import folder_written_aside
    from qlip.modeling import checkpoint
    from qlip.um3.model import UM3

    if format is Format.safetensors:
        source = checkpoint.resolve(model)
        with folder_written_aside(output) as aside:
            checkpoint.copy(source, aside, weights=False)
            UM3.from_pretrained(source).save_pretrained(aside, getattr(torch, dtype.value))
            written = sorted(path.name for path in aside.iterdir())
        return {"name": model}, [output / name for name in written]
    require("transformers", extra="hf")
    from qlip.hf.um3 import export_um3

    return {"name": model}, export_um3(model, output, getattr(torch, dtype.value))


def _llava(
    model: str, language: str, output: Path, dtype: options.Dtype, template: Path | None
) -> tuple[dict[str, Any], list[Path]]:
    """Write a LLaVA; return its description and the files."""
    import torch

    from qlip.errors import require
    from qlip.files import text_of

    require("transformers", extra="hf")
    from qlip.hf.chat_template import template_fault
    from qlip.hf.llava import export_llava
    from qlip.hf.vlm import export_vlm
    from qlip.modeling.checkpoint import resolve
    from qlip.vlm.config import is_vlm

    text = None if template is None else text_of(template.read_bytes(), str(template))
    if text is not None and (fault := template_fault(text)) is not None:
        raise QLIPError(f"{template}: not a Jinja template, {fault}; repair it")
    kind = getattr(torch, dtype.value)
    if is_vlm(resolve(language)):
        if model != options.DEFAULT_MODEL:
            usage_error(f"--model {model}: {language} has an encoder of its own; leave it out")
        return {"name": language, "projector": "trained"}, export_vlm(language, output, kind, text)
    written = export_llava(model, language, output, kind, text)
    return {"name": model, "language_model": language, "projector": "new"}, written


def _tokenizer(model: str, format: Format, output: Path, dtype: options.Dtype) -> tuple[dict[str, Any], list[Path]]:
    """Write a tokenizer; return its description and the files."""
    import torch

    from qlip.cli import models
    from qlip.data.sources.training_text import UNKNOWN, TrainingText
    from qlip.errors import require
    from qlip.files import folder_written_aside
    from qlip.modeling.export import export_onnx, require_packages

    if format is Format.onnx:
        require_packages()
    codec = models.load(model, "cpu")
    if format is Format.onnx:
        return codec.described(), export_onnx(codec.model, output)
    if format is Format.transformers:
        require("transformers", extra="hf")
        from qlip.hf.export import export_transformers

        return codec.described(), export_transformers(model, output, getattr(torch, dtype.value))
    with folder_written_aside(output) as aside:
        codec.model.save_pretrained(aside, getattr(torch, dtype.value))
        codec.processor.save_pretrained(aside)
        if (text := TrainingText.read(model)) is not UNKNOWN:
            text.save(aside)
        written = sorted(path.name for path in aside.iterdir())
    return codec.described(), [output / name for name in written]


def _decoder(model: str, format: Format, output: Path, dtype: options.Dtype) -> tuple[dict[str, Any], list[Path]]:
    """Write a decoder; return its description and the files."""
    import torch

    from qlip.lm import DecoderConfig, DecoderModel
    from qlip.lm.export import Format as StockFormat
    from qlip.lm.export import export_decoder
    from qlip.modeling.checkpoint import resolve
    from qlip.t2i.export import export_folder, export_pipeline

    kind = getattr(torch, dtype.value)
    config = DecoderConfig.from_file(resolve(model) / "config.json")
    described = {"name": model, "code_fingerprint": config.code_fingerprint}
    if format is Format.safetensors:
        return described, export_folder(model, output, kind)
    if format is Format.diffusers:
        return described, export_pipeline(model, output, kind)
    loaded = DecoderModel.from_pretrained(model)
    return described, export_decoder(loaded, cast(StockFormat, format.value), output, kind)
