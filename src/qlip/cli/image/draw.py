"""`qlip draw`: images from prompts."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.assets import BUNDLED_DRAWER
from qlip.cli import options
from qlip.cli.console import print_json, progress, show, stoppable, usage_error
from qlip.cli.image import draw_edit, draw_suite

if TYPE_CHECKING:
    from PIL import Image


DRAWING_PANEL = "Drawing"
DRAWN = Path("drawn.png")
WIDEST = 8
"""Images in a row of a sheet, at most."""
LARGEST = 1000
"""Images on a sheet, at most."""


def draw(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to draw.")] = None,
    class_names: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Class to draw, such as cat. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|DIR",
            help="An image file for one sheet of all images, or a folder (existing, or a name without suffix) for one "
            f"file per image and captions.jsonl. Default: {DRAWN}.",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of images of each prompt.", rich_help_panel=DRAWING_PANEL)
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Random seed; an image depends on it, its prompt and its number.", rich_help_panel=DRAWING_PANEL
        ),
    ] = 0,
    negative: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Prompt that guidance leads away from.", rich_help_panel=DRAWING_PANEL),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Scale of classifier-free guidance, or a schedule such as power:4:2.5; 1 is none. Default: the "
            "drawer's.",
            rich_help_panel=DRAWING_PANEL,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Temperature of sampling; 0 takes the likeliest tokens. Default: the drawer's.",
            rich_help_panel=DRAWING_PANEL,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="K",
            help="Draw from the K likeliest values only; 0 draws from all. Default: the drawer's.",
            rich_help_panel=DRAWING_PANEL,
        ),
    ] = None,
    suite: draw_suite.OptionSuite = None,
    suite_data: draw_suite.OptionData = None,
    split: draw_suite.OptionSplit = None,
    limit: draw_suite.OptionLimit = None,
    image: draw_edit.OptionImage = None,
    mask: draw_edit.OptionMask = None,
    keep: draw_edit.OptionKeep = None,
    candidates: draw_edit.OptionCandidates = None,
    gif: draw_edit.OptionGif = None,
    progressive: draw_edit.OptionProgressive = False,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Drawer: a decoder's folder, a Hub id or the bundled drawer's name.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = BUNDLED_DRAWER,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model that turns tokens into images. Default: the one that the drawer names.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Draw images from text: a sentence becomes tokens, and the tokens an image.

    The bundled drawer knows coloured shapes on black or white, ten kinds of photographs, emoji and clip art.
    """
    from PIL import Image

    from qlip.cli.outputs import check_image_name, image_file, png, write_new
    from qlip.files import write_bytes
    from qlip.lm.guidance import parse
    from qlip.modeling.checkpoint import resolve
    from qlip.t2i import Drawer
    from qlip.um3 import UM3Chat
    from qlip.um3.config import is_um3
    from qlip.um3.drawing import UM3Drawing
    from qlip.vlm.config import is_vlm

    benchmark = draw_suite.Request(suite, suite_data, split, limit)
    benchmark.check([*(prompts or ()), *(class_names or ())], output, num_images)
    output = output or DRAWN
    one_sheet = bool(output.suffix) and not output.is_dir()
    if suite is None and one_sheet:
        check_image_name(output)
    elif output.is_file():
        usage_error(f"--output {output}: is a file without a suffix; name an image file or a folder")
    part = draw_edit.Request(image, mask, keep, candidates, gif, progressive)
    part.check(suite is not None, one_sheet, output)
    schedule = None if guidance is None else parse(guidance)
    start = time.perf_counter()
    folder = resolve(model)
    if is_um3(folder):
        if suite is None:
            usage_error(
                f"--model {model}: is a UM3, which qlip draw runs with --suite alone; draw a prompt with"
                f" qlip um3 complete -m {shlex.quote(model)} -o FILE PROMPT"
            )
        if negative is not None:
            usage_error("--negative has no effect on a UM3; leave it out")
        chat = UM3Chat.from_pretrained(model, vision_tower=tokenizer, device=device, dtype=dtype.value)
        sampling = chat.settings.sampling(temperature)
        sampling = sampling if top_k is None else replace(sampling, top_k=top_k)
        draw_suite.draw_suite(benchmark, UM3Drawing(chat, seed, schedule, sampling), output, as_json)
        return
    if is_vlm(folder):
        usage_error(f"--model {model}: is a vision-language model, which draws nothing; ask it with qlip chat")
    drawer = Drawer.from_pretrained(model, tokenizer=tokenizer, device=device, dtype=dtype.value)
    sampling, schedule = drawer.settings.sampling(temperature, top_k), drawer.schedule(schedule)
    tokens = drawer.decoder.config.num_tokens
    if negative is not None and max(schedule.scale(token, tokens) for token in range(tokens)) <= 1:
        usage_error(f"--negative has no effect at guidance {schedule}; give --guidance too, such as 2")
    if suite is not None:
        from qlip.t2i import Drawing

        drawing = Drawing(drawer, seed, schedule, sampling, negative)
        draw_suite.draw_suite(benchmark, drawing, output, as_json)
        return
    named = [*(prompts or ()), *(drawer.caption_of(name) for name in class_names or ())]
    if not named:
        if not drawer.unconditional:
            usage_error("nothing to draw; give a prompt, or --class")
        named = ["0"]  # trained on images alone
    if one_sheet and len(named) * num_images > LARGEST:
        usage_error(f"{len(named) * num_images:,} images on one sheet; give a folder to --output")
    texts = [prompt for prompt in named for _ in range(num_images)]
    condition = drawer.condition(named).rows([place for place in range(len(named)) for _ in range(num_images)])
    against = None if negative is None else drawer.condition([negative])
    edit = part.open(drawer)
    if one_sheet:
        height, width = (side * drawer.codec.model.patch_size for side in drawer.decoder.config.grid)
        blank = [Image.new("RGB", (width, height))] * len(texts)
        image_file(output, sheet(texts, blank, num_images))  # before anything is drawn: a format has a largest size
    loaded = time.perf_counter()
    images: list[Image.Image] = []
    rows = draw_edit.Rows(part, output, lambda some: sheet(texts, some, num_images), len(texts))
    advice = "the sheet has the rows drawn so far" if progressive else "nothing was written"
    files = [output] * len(texts)
    if not one_sheet:
        files = [output / f"{number:05d}.png" for number in range(len(texts))]
        lines = [json.dumps({"file_name": file.name, "text": text}) for file, text in zip(files, texts, strict=True)]
        write_new(output / "captions.jsonl", ("\n".join(lines) + "\n").encode(), overwrite, folder=output)
        advice = "finished images are kept"
    with stoppable(advice), progress("drawing", len(texts), "images") as bar:
        for first in range(0, len(texts), drawer.AT_ONCE):
            numbers = range(first, min(first + drawer.AT_ONCE, len(texts)))
            indices = drawer.draw(
                condition.rows(numbers),
                guidance=schedule,
                sampling=sampling,
                negative=against,
                seed=seed,
                numbers=numbers,
                edit=edit,
                on_step=rows.on_step(drawer, images),
            )
            images += drawer.images(indices)
            if not one_sheet:
                for number in numbers:
                    write_new(files[number], png(images[number]), overwrite, folder=output)
            bar.advance(len(numbers))
    if one_sheet:
        write_bytes(output, image_file(output, sheet(texts, images, num_images)))
    took = time.perf_counter() - loaded
    rows.finish(images)
    settings = {
        "guidance": str(schedule),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "seed": seed,
        **({} if negative is None else {"negative": negative}),
        **part.settings(edit),
    }
    if as_json:
        drawn = [{"prompt": text, "file": str(file)} for text, file in zip(texts, files, strict=True)]
        report: dict[str, Any] = {"model": drawer.name, "settings": settings, "seconds": round(took, 3)}
        print_json(report | {"images": drawn})
        return
    count = f"{len(images)} images" if len(images) > 1 else "1 image"
    where = "" if edit is None else f", {settings['drawn_tokens']} of {len(edit.hole)} tokens drawn,"
    show(f"{count}{where} in {took:.2f} s (loading {loaded - start:.1f} s): {output}")


def sheet(texts: list[str], images: Sequence[Image.Image], num_images: int) -> Image.Image:
    """Lay out the images: a row per prompt where there are several images of each, else a grid."""
    from qlip.cli.image import contact_sheet

    exhibits = [contact_sheet.Exhibit("", (("", image),), text) for text, image in zip(texts, images, strict=True)]
    return contact_sheet.draw(exhibits, columns=min(num_images, WIDEST) if num_images > 1 else None)
