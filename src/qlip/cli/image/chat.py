"""`qlip chat`: questions about images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.assets import BUNDLED_TALKER
from qlip.cli import inputs, options
from qlip.cli.console import Failures, print_json, show, stoppable, usage_error
from qlip.cli.conversation import converse, is_typed, lines_of_stdin
from qlip.errors import QLIPError

if TYPE_CHECKING:
    from qlip.vlm.chat import VisionChat

ANSWER_PANEL = "Answers"
HELP = "/image FILE adds an image, /reset starts again with the first images, /quit ends"

Talker = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Vision-language model: a folder, a Hub id, or the bundled model's name.",
        rich_help_panel=options.MODEL_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Longest answer in tokens. Default: the model's.", rich_help_panel=ANSWER_PANEL
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Temperature of sampling; 0 takes the likeliest tokens. Default: the model's.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
AnswerSeed = Annotated[int, typer.Option(min=0, help="Random seed of sampled answers.", rich_help_panel=ANSWER_PANEL)]


def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, folders or patterns, shown before the first question."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", metavar="TEXT", help="Question to answer, instead of asking for one. May be repeated."
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: AnswerSeed = 0,
    model: Talker = BUNDLED_TALKER,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Ask a vision-language model about images.

    Questions follow each other in one conversation. They come from --question, from the keyboard, or a line each from
    stdin if that is not a terminal. On the keyboard, /image FILE adds an image to the next question, /reset starts
    again with the first images, and /quit ends.
    """
    from qlip.cli import models

    found = [str(path) for path in inputs.paths(images or [], inputs.IMAGES, "image")]
    typed = not question and is_typed()
    if typed and as_json:
        usage_error("--json needs questions; give --question, or lines on stdin")
    chat = models.load_talker(model, device, dtype)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with stoppable("the conversation is not kept"):
        if typed:
            converse(
                found,
                HELP,
                answer=lambda text, images: _answer(chat, text, images, settings),
                check_image=chat.load,
                reset=chat.reset,
            )
            return
        results, failures, shown = list[dict[str, str]](), Failures(), found
        questions = question or lines_of_stdin("question")
        for number, text in enumerate(questions, start=1):
            try:
                answer = _answer(chat, text, shown, settings, silent=as_json)
            except QLIPError as error:
                failures.add(f"question {number}", error)
                continue
            results.append({"question": text, "answer": answer})
            shown = []
    if as_json:
        print_json({"model": chat.name, "images": found, "results": results, "failures": failures.found})
    failures.finish(len(questions), "question")


def _answer(chat: VisionChat, question: str, images: list[str], settings: dict[str, Any], silent: bool = False) -> str:
    """Answer a question, and show the answer as it comes."""
    answer = ""
    for piece in chat.stream(question, images, **settings):
        answer += piece
        if not silent:
            show(piece, end="")
    if not silent:
        show()
    return answer
