"""`qlip draw --suite`: images of a benchmark in its scorer's layout, and the score of made scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli.console import new_table, print_json, print_table, progress, show, stoppable, usage_error
from qlip.files import plural

if TYPE_CHECKING:
    from PIL import Image

    from qlip.evaluation.prompt_suites import Suite
    from qlip.t2i import Drawing
    from qlip.um3.drawing import UM3Drawing

PANEL = "Suites"
SHEET = "sheet.png"
ON_A_SHEET, COLUMNS, BORDER, PANEL_SIDE = 40, 5, 2, 272


class SuiteName(StrEnum):
    """Benchmarks of text to image."""

    geneval = "geneval"
    dpg = "dpg"
    coco30k = "coco30k"
    mjhq = "mjhq"
    compbench = "compbench"
    hpsv2 = "hpsv2"
    parti = "parti"
    adm = "adm"
    scenes = "scenes"


class Split(StrEnum):
    """Splits of made scenes with captions."""

    seen = "seen"
    unseen_pair = "unseen_pair"
    unseen_count = "unseen_count"
    unseen_relation = "unseen_relation"
    hard = "hard"


OptionSuite = Annotated[
    SuiteName | None,
    typer.Option(
        "--suite",
        help="Draw the prompts of a benchmark into the folder --output, as its official scorer reads them; the same "
        "command continues a stopped one. adm: 50,000 images of classes; scenes: made scenes, scored at once.",
        rich_help_panel=PANEL,
    ),
]
OptionData = Annotated[
    Path | None,
    typer.Option(
        "--suite-data",
        metavar="FILE|DIR",
        help="The benchmark's own prompts, as it ships them; adm and scenes need none.",
        rich_help_panel=PANEL,
    ),
]
OptionSplit = Annotated[
    Split | None,
    typer.Option(help="Split of suite scenes; default: seen.", rich_help_panel=PANEL, show_default=False),
]
OptionLimit = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of prompts, the first ones, or of images of suite adm. Default: all.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Request:
    """Options of `qlip draw` that are about suites."""

    suite: SuiteName | None
    data: Path | None
    split: Split | None
    limit: int | None

    def check(self, prompts: Sequence[str], output: Path | None, num_images: int) -> None:
        """Refuse options that do not go together, before anything is loaded."""
        if self.suite is None:
            for name in ("suite-data", "split", "limit"):
                if getattr(self, name.removeprefix("suite-")) is not None:
                    usage_error(f"--{name} needs --suite")
            return
        if prompts or num_images > 1:
            usage_error("a suite has its own prompts and number of images; leave out PROMPT, --class and --num-images")
        if output is None:
            usage_error("--suite needs --output, a folder")
        if output.is_file():
            usage_error(f"--output {output}: is a file; a suite is drawn into a folder")
        if (self.data is None) != (self.suite in (SuiteName.adm, SuiteName.scenes)):
            without = self.data is None
            usage_error(
                f"--suite {self.suite} "
                + ("needs --suite-data" if without else "has no prompt files; leave out --suite-data")
            )
        if self.split is not None and self.suite != SuiteName.scenes:
            usage_error("--split is for --suite scenes")

    def open(self, drawing: Drawing | UM3Drawing) -> Suite:
        """Open the suite."""
        from qlip.evaluation import prompt_suites as suites

        assert self.suite is not None
        if self.suite == SuiteName.scenes:
            return suites.scenes(str(self.split or Split.seen), self.limit)
        if self.suite == SuiteName.adm:
            return suites.adm(drawing.classes, self.limit or suites.ADM_IMAGES)
        assert self.data is not None
        return suites.open_suite(self.suite, self.data, self.limit)


def draw_suite(request: Request, drawing: Drawing | UM3Drawing, out: Path, as_json: bool) -> None:
    """Draw a suite; made scenes are then scored."""
    from qlip.evaluation import prompt_suites as suites

    suite, settings = request.open(drawing), drawing.settings()
    total = sum(len(file.numbers) for file in suite.files)
    with (
        stoppable("finished images are kept; run the same command to continue"),
        progress(f"drawing {suite.name}", total, "images") as bar,
    ):
        count = suites.draw_suite(
            suite,
            drawing,
            out,
            settings,
            check=drawing.check,
            batch_size=drawing.at_once,
            on_progress=bar.advance,
        )
    if request.suite == SuiteName.scenes:
        _score(suite, drawing, out, settings, as_json)
        return
    report = {"suite": suite.name, "folder": str(out), "images": total, "drawn": count, "settings": settings}
    if as_json:
        print_json(report)
    else:
        there = f", {total - count:,} were there" if count < total else ""
        show(f"{plural(count, 'image')} of {suite.name} drawn{there}: {out}")


def _score(suite: Suite, drawing: Drawing | UM3Drawing, out: Path, settings: dict[str, Any], as_json: bool) -> None:
    from qlip.cli.outputs import png
    from qlip.evaluation import prompt_suites as suites
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.files import write_bytes

    with (
        stoppable("images are kept; run the same command to score them"),
        progress("checking scenes", len(suite.files)) as bar,
    ):
        found = suites.score_scenes(suite, out, drawing.rebuild, on_progress=bar.advance)
    result = suites.scenes_result(drawing.name, found, suite, settings, drawing.device)
    write_bundle(out, result, [found])
    write_bytes(out / SHEET, png(_sheet(suite, out, found.tables["images"])))
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    table = new_table("of made scenes", "%", "95% interval", "n", numbers=("%", "95% interval", "n"))
    for name, one in found.values.items():
        interval = "" if one.low is None else f"{one.low:.1f} to {one.high:.1f}"
        table.add_row(name.removeprefix("scenes_").replace("_", " "), f"{one.value:.1f}", interval, str(one.count))
    print_table(table)
    show(f"\nFirst images with marks: {out / SHEET}. Compare with other drawers: qlip compare {out} ...")


def _sheet(suite: Suite, out: Path, rows: list[dict[str, Any]]) -> Image.Image:
    """The first images, with a border and a word for right and wrong ones, and their captions."""
    from PIL import Image, ImageOps

    from qlip.cli.image import contact_sheet

    exhibits = []
    for file, row in list(zip(suite.files, rows, strict=True))[:ON_A_SHEET]:
        with Image.open(out / file.path) as image:
            colour = contact_sheet.RIGHT if row["right"] else contact_sheet.WRONG
            framed = ImageOps.expand(image.convert("RGB"), BORDER, colour)
        exhibits.append(contact_sheet.Exhibit("right" if row["right"] else "WRONG", (("", framed),), row["caption"]))
    return contact_sheet.draw(exhibits, columns=min(COLUMNS, len(exhibits)), small=PANEL_SIDE)
