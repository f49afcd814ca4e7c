"""`qlip describe`: a caption for every image of a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qlip.assets import BUNDLED_TALKER
from qlip.cli import inputs, io_pipeline, options
from qlip.cli.console import Failures, note, plural, print_json, progress, show, stoppable, usage_error
from qlip.cli.image.chat import AnswerSeed, MaxTokens, Talker, Temperature
from qlip.errors import QLIPError
from qlip.files import flush

QUESTION = "Describe the image."
BEGIN = '{"file_name": '
"""Begin of the lines that are written."""


def describe(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images, with its subfolders.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File of captions, a JSON object per line; lines that it has are kept. Default: captions.jsonl in the "
            "folder, where training finds it.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str, typer.Option("--question", metavar="TEXT", help="Question whose answer is the caption.")
    ] = QUESTION,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: AnswerSeed = 0,
    batch_size: options.BatchSize = 16,
    model: Talker = BUNDLED_TALKER,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Write a caption for every image of a folder, with a vision-language model.

    Lines are {"file_name": path relative to the folder, "text": caption}. An image that the file has a caption of is
    skipped, so a stopped command continues where it stopped.
    """
    from qlip.cli import models
    from qlip.runtime.workspace import lock_folder

    if not folder.is_dir():
        usage_error(f"{folder}: no such folder")
    output = output or folder / "captions.jsonl"
    if output.suffix != ".jsonl":
        usage_error(f"{output}: must end in .jsonl")
    found = inputs.paths([str(folder)], inputs.IMAGES, "image")
    with lock_folder(output.parent, "another command writes captions here; wait for it, or stop it"):
        done = captioned(output)
        waiting = [path for path in found if _name(path, folder) not in done]
        if len(waiting) < len(found):
            note(f"note: {output}: has captions of {plural(len(found) - len(waiting), 'image')}, which are kept")
        failures, written, numbers = Failures(), 0, {path: number for number, path in enumerate(found)}
        if waiting:
            chat = models.load_talker(model, device, dtype)
            settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
            with (
                stoppable("finished captions are kept; run the same command to continue"),
                progress("describing", len(waiting), "images") as bar,
            ):
                stream = io_pipeline.read_ahead(waiting, chat.load, failures)
                for batch in io_pipeline.in_batches(stream, batch_size, lambda _: None):
                    images = [image for _, image in batch]
                    settings["numbers"] = [numbers[path] for path, _ in batch]
                    captions = chat.answer_batch(images, [question] * len(batch), **settings)
                    names = [_name(path, folder) for path, _ in batch]
                    append(output, dict(zip(names, captions, strict=True)))
                    written += len(batch)
                    bar.advance(len(batch))
    if as_json:
        print_json(
            {
                "model": model,
                "output": str(output),
                "images": len(found),
                "written": written,
                "kept": len(found) - len(waiting),
                "failures": failures.found,
            }
        )
    else:
        show(f"{plural(written, 'caption')} in {output}")
    failures.finish(len(waiting), "image")


def append(path: Path, captions: Mapping[str, str]) -> None:
    """Add the lines of captions by image to a file, and flush it to disk.

    Raises:
        QLIPError: the file cannot be written, as on a full disk.
    """
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items()]
    try:
        with path.open("ab") as file:
            file.write("".join(lines).encode())
        flush(path)
    except OSError as error:
        advice = "finished captions are kept; make room, and run the same command to continue"
        raise QLIPError(f"{path}: {error.strerror or error}; {advice}") from None


def captioned(path: Path) -> set[str]:
    """Return the images that a file has captions of, by their names in it; a line cut off at its end is removed.

    Raises:
        QLIPError: a line that names no image; the file is as it was.
    """
    from qlip.data.sources.base import PATH_FIELDS, annotation_of, field_of
    from qlip.data.sources.folder import records_in

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:] or b"{}")
    except ValueError:
        begun = data[end:].decode(errors="replace")
        if not begun.startswith(BEGIN[: len(begun)]):
            raise QLIPError(f"{path}: its last line is no caption; give another output, or repair the line") from None
        data = data[:end]  # a killed process left it
        note(f"note: {path}: its last line was cut off and is removed: {begun}")
    names = set[str]()
    for where, record in records_in(str(path), data):
        field = field_of(record, PATH_FIELDS)
        if field is None or not isinstance(record[field], str):
            raise QLIPError(f"{where}: names no image; give another output, or repair the line")
        if annotation_of(record, where, None).captions:
            names.add(Path(str(record[field])).as_posix())
    with path.open("r+b") as file:
        file.truncate(len(data))
        if data and not data.endswith(b"\n"):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    return names


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
