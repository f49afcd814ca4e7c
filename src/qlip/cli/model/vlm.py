"""`qlip vlm`: models that answer questions about images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.assets import BUNDLED_TALKER
from qlip.cli import options
from qlip.cli.console import new_table, print_json, print_table, progress, show, stoppable
from qlip.cli.model import vlm_merge

if TYPE_CHECKING:
    from PIL import Image

    from qlip.evaluation.evaluators.base import MetricResult, MetricValue
    from qlip.evaluation.run.scene_answers import Answers

app = typer.Typer(no_args_is_help=True, help="Measure vision-language models, and merge runs.")
app.command("merge")(vlm_merge.merge)

SHEET = "sheet-{}.png"
ON_A_SHEET, COLUMNS, PANEL_SIDE, LINE = 24, 6, 256, 34


class Split(StrEnum):
    """Splits of questions about made scenes."""

    seen = "seen"
    unseen_pair = "unseen_pair"


Splits = Annotated[
    list[Split] | None,
    typer.Option(
        help="Split: seen, scenes like those of training; unseen_pair, things of a colour and shape that training "
        "never shows together. May be repeated; default: both.",
        show_default=False,
    ),
]
PerKind = Annotated[int, typer.Option(min=2, metavar="N", help="Questions of each of the seven kinds.")]


@app.command("eval")
def evaluate(
    output: options.Folder,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Vision-language model: a folder, a Hub id, or the bundled model's name."),
    ] = BUNDLED_TALKER,
    split: Splits = None,
    per_kind: PerKind = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions per batch of the model.", rich_help_panel=options.MODEL_PANEL)
    ] = 64,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Ask a model exact questions about made scenes, with their images, with other scenes' images, and with none.

    Finished answers are kept in the output folder; the same command continues a stopped one.
    """
    from qlip.cli.outputs import png
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.run import scene_answers as scenes
    from qlip.files import write_bytes
    from qlip.modeling.checkpoint import Files
    from qlip.runtime.workspace import Workspace
    from qlip.vlm.chat import VisionChat

    splits = [str(one) for one in split or Split]
    chat = VisionChat.from_pretrained(model, device=device, dtype=str(dtype))
    fingerprint = Files(chat.name).digest()
    settings = {"dtype": str(dtype), "max_tokens": scenes.MAX_TOKENS}
    work = Workspace(output, {"model": fingerprint, "per_kind": per_kind, **settings}, of="measurement")
    with (
        work.lock(),
        stoppable("finished answers are kept; run the same command to continue"),
        progress("answering", number_of_questions(splits, per_kind), "questions") as bar,
    ):
        work.claim()
        ask = partial(scenes.collect, scenes.answer_of(chat), batch_size=batch_size, work=work)
        answers = [ask(one, per_kind, on_progress=bar.advance) for one in splits]
    scores = [scenes.score(one) for one in answers]
    result = scenes.result(
        {"name": chat.name, "fingerprint": fingerprint}, answers, scores, chat.model.device, settings
    )
    write_bundle(output, result, scores)
    for one in answers:
        write_bytes(output / SHEET.format(one.split), png(sheet(one)))
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    for one, found in zip(answers, scores, strict=True):
        print_scores(one.split, found)
    show(f"First questions with answers: {output / SHEET.format(splits[0])}. Compare models: qlip compare {output} ...")


def print_scores(split: str, found: MetricResult) -> None:
    """Print the rows of a split by kind."""
    from qlip.data.public.scene_questions import KINDS
    from qlip.evaluation.run.scene_answers import ROWS

    rows = [*(row for row in ROWS if row in found.values), "majority"]
    above = "right less shuffled"
    head = ("n", "right, %", *rows[1:], *[above] * ("above_shuffled" in found.values))
    table = new_table(split.replace("_", " "), *head, numbers=head)
    for kind in ("", *KINDS):
        end = f"_{kind}" if kind else ""
        right, *others = (found.values[row + end] for row in rows)
        cells = [f"{right.count:,}", with_interval(right), *(f"{one.value:.1f}" for one in others)]
        if above in head:
            cells.append(with_interval(found.values[f"above_shuffled{end}"]))
        table.add_row(kind or "all", *cells)
    print_table(table)
    show()


def sheet(answers: Answers) -> Image.Image:
    """Draw the first questions with their images, the right answers, and the given ones in green or red."""
    from qlip.cli.image import contact_sheet
    from qlip.evaluation.run.scene_answers import is_right

    exhibits = []
    for question, given in list(zip(answers.questions, answers.given["right"], strict=True))[:ON_A_SHEET]:
        text = [*textwrap.wrap(question.text, LINE), "", ""]
        colour = contact_sheet.RIGHT if is_right(question, given) else contact_sheet.WRONG
        lines = ((text[1], contact_sheet.FAINT), (f"right: {question.answer}", contact_sheet.INK))
        said = textwrap.shorten(given, LINE - 7, placeholder="...") or "nothing"
        exhibits.append(
            contact_sheet.Exhibit(
                question.kind, (("", question.image()),), text[0], (*lines, (f"given: {said}", colour))
            )
        )
    return contact_sheet.draw(exhibits, columns=min(COLUMNS, len(exhibits)), small=PANEL_SIDE)


def number_of_questions(splits: Sequence[str], per_kind: int) -> int:
    """Questions that are asked, of which blind ones are counted once per text."""
    from qlip.evaluation.run.scene_answers import questions_of

    total = 0
    for split in splits:
        questions = questions_of(split, per_kind)
        total += 2 * len(questions) + len({one.text for one in questions})
    return total


def with_interval(one: MetricValue) -> str:
    """Format a value with its 95% interval."""
    value, low, high = (None if bound is None else round(bound, 1) + 0.0 for bound in (one.value, one.low, one.high))
    return f"{value:.1f}" + ("" if low is None else f" ({low:.1f} to {high:.1f})")
