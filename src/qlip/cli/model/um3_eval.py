"""`qlip um3 eval`: both directions of a model of text and images, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.assets import BUNDLED_UM3
from qlip.cli import options
from qlip.cli.console import new_table, print_json, print_table, progress, show, stoppable
from qlip.cli.model.vlm import PerKind, Split, Splits, number_of_questions, print_scores, with_interval

if TYPE_CHECKING:
    from qlip.evaluation.evaluators.base import MetricResult


def evaluate(
    output: options.Folder,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="UM3: a folder, a Hub id, or the bundled model's name.")
    ] = BUNDLED_UM3,
    split: Splits = None,
    per_kind: PerKind = 200,
    num_scenes: Annotated[
        int, typer.Option("--scenes", min=2, metavar="N", help="Scenes of each split that are described, and drawn.")
    ] = 400,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXTS",
            help="Texts whose bits per byte are measured: files, or a public dataset and its split, such as sotu:test. "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="LLM",
            help="Text decoder that the model grew from, or any other, whose bits per byte stand beside the model's.",
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1.0, help="Scale of guidance of drawings; default: the model's.")
    ] = None,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions, captions or drawings per batch.", rich_help_panel=options.MODEL_PANEL)
    ] = 64,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Measure what one model reads and draws: captions, answers and drawings of made scenes, and texts.

    Captions and answers are held against their scenes, against others and without an image, drawings against their
    captions, against others and without a caption. Finished ones are kept in the output folder; the same command
    continues a stopped one. Drawings lie in DIR/drawn, for qlip eval generated.
    """
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.run.scene_answers import UM3, result_of
    from qlip.lm.causal import CausalModel
    from qlip.lm.guidance import Constant
    from qlip.lm.tokenizer import LLMTokenizer
    from qlip.modeling.checkpoint import Files
    from qlip.runtime.workspace import Workspace
    from qlip.um3 import evaluate as um3
    from qlip.um3.session import UM3Chat

    splits = [str(one) for one in split or Split]
    texts = {name: um3.read_documents(name) for name in text or ()}
    other = None if before is None else (CausalModel.from_pretrained(before), LLMTokenizer.from_folder(before))
    chat = UM3Chat.from_pretrained(model, device=device, dtype=str(dtype))
    drawing = um3.DrawSettings(seed, None if guidance is None else Constant(guidance))
    settings = {
        "dtype": str(dtype),
        "max_tokens": um3.MAX_TOKENS,
        "seed": seed,
        "guidance": str(chat.guidance(drawing.guidance)),
        "sampling": str(chat.settings.sampling()),
        "tokenizer": chat.codec.model.decoder_fingerprint,
    }
    fingerprint = Files(chat.name).digest()
    plan = {"model": fingerprint, "per_kind": per_kind, "scenes": num_scenes, **settings}
    work = Workspace(output, plan, of="measurement")
    total = um3.steps(len(splits), number_of_questions(splits, per_kind), num_scenes)
    with (
        work.lock(),
        stoppable("finished answers and drawings are kept; run the same command to continue"),
        progress("measuring", total, "answers and drawings") as bar,
    ):
        work.claim()
        found = um3.measure(
            chat,
            work,
            splits=splits,
            per_kind=per_kind,
            num_scenes=num_scenes,
            drawing=drawing,
            options=settings,
            batch_size=batch_size,
            on_progress=bar.advance,
        )
        found += [um3.measure_text(chat, name, documents, other) for name, documents in texts.items()]
    rows, metrics = [row for row, _ in found], [one for _, one in found]
    subject = {"kind": UM3, "name": chat.name, "fingerprint": fingerprint}
    result = result_of(subject, rows, chat.model.device)
    write_bundle(output, result, metrics)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    for row, one in found:
        if row.evaluator == "scene_questions":
            print_scores(row.title, one)
        elif row.evaluator == "scene_captions":
            print_by_family(row.title, one, "captions")
        elif row.evaluator == "text":
            show(f"{row.title}: " + ", ".join(f"{name} {value.value:.3f}" for name, value in one.values.items()))
        else:
            print_by_family(f"{row.title}, {row.settings['split'].replace('_', ' ')}", one, "scenes")
    show(f"Drawings: {output / 'drawn'}. Compare models: qlip compare {output} ...")


def print_by_family(title: str, found: MetricResult, prefix: str) -> None:
    """Print right ones and controls of all scenes, of one object, and of each family."""
    from qlip.data.public.scene_captions import FAMILIES

    columns = {f"{prefix}_{name}": name.replace("_", " ") for name in _COLUMNS}
    shown = [name for name in columns if name in found.values]
    head = ("n", *("right, %" if name.endswith("_right") else columns[name] for name in shown))
    table = new_table(title, *head, numbers=head)
    for part in ("", "_one_object", *(f"_{one}" for one in FAMILIES)):
        values = [found.values.get(name + part) for name in shown]
        if values[0] is not None:
            cells = ["" if one is None else with_interval(one) for one in values]
            table.add_row(part[1:].replace("_", " ") or "all", f"{values[0].count:,}", *cells)
    print_table(table)
    scores = [name for name in ("bleu_4", "cider", "meteor") if name in found.values]
    if scores:
        show(", ".join(f"{name} {found.values[name].value:.1f}" for name in scores))
    for name in ("bleu_4", "meteor"):
        if name in found.notes:
            show(found.notes[name])
    show()


_COLUMNS: Sequence[str] = ("right", "shuffled", "blind", "above_shuffled", "other_caption", "contradicted", "rebuilt")
