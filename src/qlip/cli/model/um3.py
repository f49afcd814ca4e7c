"""`qlip um3`: one model over text and images, which reads, describes and draws."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.assets import BUNDLED_UM3
from qlip.cli import inputs, options
from qlip.cli.console import Failures, print_json, show, stoppable, usage_error
from qlip.cli.conversation import converse, is_typed, lines_of_stdin
from qlip.cli.image.chat import ANSWER_PANEL, Temperature
from qlip.cli.model import um3_eval
from qlip.errors import QLIPError
from qlip.files import write_bytes

if TYPE_CHECKING:
    from qlip.lm.guidance import Guidance
    from qlip.um3.session import UM3Chat

app = typer.Typer(no_args_is_help=True, help="Use models over text and images, and measure them: UM3.")
app.command("eval")(um3_eval.evaluate)

HELP = "/image FILE adds an image, /draw TEXT draws one, /reset starts again, /quit ends"


class GenerationMode(StrEnum):
    """Kinds of answers."""

    text = "text"
    image = "image"
    interleaved = "interleaved"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="UM3: a folder, a Hub id, or the bundled model's name.",
        rich_help_panel=options.MODEL_PANEL,
    ),
]
Tower = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="QLIP between images and tokens. Default: the one that the model names.",
        rich_help_panel=options.MODEL_PANEL,
    ),
]
ModeOption = Annotated[
    GenerationMode,
    typer.Option(
        "--mode",
        help="Kind of answer. text: text alone; image: one image; interleaved: text, and images where the "
        "model begins one.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Longest answer in tokens, those of images too. Default: 256, and room for one image.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
GuidanceOption = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        metavar="SCALE",
        help="Scale of classifier-free guidance of images, or a schedule such as power:4:2.5; 1 is none. Default: the "
        "model's.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
AnswerSeed = Annotated[int, typer.Option(min=0, help="Random seed of answers.", rich_help_panel=ANSWER_PANEL)]
Answers = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the images that the model draws.")
]


@app.command()
def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, folders or patterns, shown before the first message."),
    ] = None,
    message: Annotated[
        list[str] | None,
        typer.Option("--message", metavar="TEXT", help="Message, instead of asking for one. May be repeated."),
    ] = None,
    output: Answers = Path("drawn"),
    mode: ModeOption = GenerationMode.interleaved,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    guidance: GuidanceOption = None,
    seed: AnswerSeed = 0,
    model: Model = BUNDLED_UM3,
    tokenizer: Tower = None,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Talk with a model that reads and writes text and images.

    Messages follow each other in one conversation. They come from --message, from the keyboard, or a line each from
    stdin if that is not a terminal. On the keyboard, /image FILE adds an image to the next message, /draw TEXT asks for
    an image, /reset starts again, and /quit ends.
    """
    found = inputs.paths(images or [], inputs.IMAGES, "image")
    typed = not message and is_typed()
    if typed and as_json:
        usage_error("--json needs messages; give --message, or lines on stdin")
    talk = _Talk(_load(model, tokenizer, device, dtype), output, overwrite, as_json)
    settings = _settings(talk.chat, mode, max_tokens, temperature, guidance, seed)
    with stoppable("drawn images are kept, the conversation is not"):
        if typed:
            drawing = settings | {"generation_mode": "image", "max_tokens": None}
            converse(
                [str(file) for file in found],
                HELP,
                answer=lambda text, images: talk.say([*map(Path, images), text], settings),
                check_image=lambda file: talk.chat.codec.processor.preprocessing.load(Path(file)),
                reset=talk.chat.reset,
                draw=lambda text, images: talk.say([*map(Path, images), text], drawing),
            )
            return
        results, failures = list[dict[str, Any]](), Failures()
        messages = message or lines_of_stdin("message")
        for number, text in enumerate(messages, start=1):
            try:
                results.append({"message": text, "answer": talk.say([*found, text], settings)})
            except QLIPError as error:
                failures.add(f"message {number}", error)
                continue
            found = []
    if as_json:
        print_json({"model": talk.chat.name, "results": results, "failures": failures.found})
    failures.finish(len(messages), "message")


@app.command()
def complete(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; none with --image lets the model describe it.")
    ] = "",
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Image before the prompt.", exists=True, dir_okay=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Image file: one image is drawn from the prompt, and no text follows.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    guidance: GuidanceOption = None,
    seed: AnswerSeed = 0,
    model: Model = BUNDLED_UM3,
    tokenizer: Tower = None,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Continue a text, describe an image, or draw one from a text.

    Without --output the text continues, as it comes; with it the image is written there.
    """
    from qlip.cli import outputs

    if output is not None:
        outputs.check_image_name(output)
    elif guidance is not None:
        usage_error("--guidance is of images; give --output too, or leave it out")
    chat = _load(model, tokenizer, device, dtype)
    mode = GenerationMode.text if output is None else GenerationMode.image
    settings = _settings(chat, mode, max_tokens, temperature, guidance, seed)
    answer = ""
    with stoppable("nothing is kept"):
        for part in chat.stream([*([] if image is None else [image]), prompt], **settings):
            if isinstance(part, str):
                answer += part
                if not as_json:
                    show(part, end="")
            elif output is not None:
                write_bytes(output, outputs.image_file(output, part))
    if as_json:
        print_json(
            {"model": chat.name, "prompt": prompt, **({"text": answer} if output is None else {"file": str(output)})}
        )
    elif output is None:
        show()
    else:
        show(f"1 image: {output}")


class _Talk:
    """A conversation whose drawn images become files."""

    def __init__(self, chat: UM3Chat, folder: Path, overwrite: bool, silent: bool) -> None:
        self.chat, self.folder, self.overwrite, self.silent = chat, folder, overwrite, silent
        self.count = 0

    def say(self, parts: list[Any], settings: dict[str, Any]) -> list[dict[str, str]]:
        """Answer, and show the answer as it comes."""
        from qlip.cli import outputs

        found = list[dict[str, str]]()
        for part in self.chat.stream(parts, **settings):
            if isinstance(part, str):
                if found and "text" in found[-1]:
                    found[-1]["text"] += part
                else:
                    found.append({"text": part})
                said = part
            else:
                while (file := self.folder / f"{self.count:05d}.png").exists() and not self.overwrite:
                    self.count += 1  # of an earlier conversation
                outputs.write_new(file, outputs.png(part), self.overwrite, folder=self.folder)
                self.count += 1
                found.append({"file": str(file)})
                said = f"[{file}]"
            if not self.silent:
                show(said, end="")
        if not self.silent:
            show()
        return found


def _load(name: str, tokenizer: str | None, device: str, dtype: options.Dtype) -> UM3Chat:
    from qlip.cli import models
    from qlip.um3.session import UM3Chat

    return UM3Chat.from_pretrained(name, vision_tower=tokenizer, device=models.pick_device(device), dtype=dtype.value)


def _settings(
    chat: UM3Chat,
    mode: GenerationMode,
    max_tokens: int | None,
    temperature: float | None,
    guidance: str | None,
    seed: int,
) -> dict[str, Any]:
    """Arguments of `UM3Chat.stream`."""
    from qlip.lm.guidance import parse

    schedule: Guidance | None = None if guidance is None else parse(guidance)
    return {
        "generation_mode": mode.value,
        "max_tokens": max_tokens,
        "sampling": chat.settings.sampling(temperature),
        "guidance": schedule,
        "seed": seed,
    }
