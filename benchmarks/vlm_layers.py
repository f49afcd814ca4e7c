"""What a small talker answers about made scenes by layer and tower: ``python -m benchmarks.vlm_layers layers -o DIR``.

Table 6 of the paper (arXiv 2502.05178) at the smallest scale. Each talker, of the recipe ``vlm/nano``, trains from
scratch at constant rates for a number of CPU seconds, and its averaged weights answer held-out questions exactly:
with their scenes, with other scenes, and without an image. ``layers`` compares hidden states of one tower: -2, -1, and
the codes behind the quantizer. ``towers`` compares towers at layer -2: ``--tower NAME FOLDER``, such as the twins that
trained without text, or on text alone.

Features differ in size (behind the quantizer they are forty times smaller), and the best learning rate of the
projector with them: ``--projector-lr RATE...`` trains each variant at several rates, ``--only NAME...`` some variants.
The recipe is made for a long training; ``--set KEY=VALUE...`` changes its values, as ``qlip train`` does.

Every finished training is a line of ``results.jsonl`` in the folder, and is skipped when the command runs again;
tables are printed from what is there. One process with one thread.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timed
from benchmarks.drawer_tables import Row, joined, line, paired, picked, share
from qlip.data.public.scene_questions import KINDS
from qlip.errors import QLIPError
from qlip.evaluation.run.scene_answers import PER_KIND, SPLITS, Answers, answer_of, collect, majority, questions_of
from qlip.runtime.workspace import Workspace
from qlip.vlm.chat import VisionChat

KEY = ("kind", "part", "variant", "seed")
LAYERS: dict[str, int | str] = {"layer -2": -2, "layer -1": -1, "quantized": "quantized"}
POINTS, PER_POINT = 8, 20
"""Points of a curve, and questions of each kind at each."""


# ---------------------------------------------------------------- training


def recipe_of(name: str, tower: str, layer: int | str, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Values of a recipe: at rates that stay constant after the warm-up, in one process with one thread.

    Args:
        name: of a packaged recipe of the task ``vlm``, or its file.
        tower: that sees.
        layer: of the tower.
        seed: of the run.
        overrides: ``key=value``, as ``qlip train`` takes them.
    """
    values = timed.load(name, overrides)
    values["model"] |= {"vision_tower": tower, "layer": layer}
    return timed.constant(values, seed)


def train(values: dict[str, Any], seconds: float, per_kind: int, folder: Path) -> dict[str, Any]:
    """Train a talker, export it, and let it answer.

    Args:
        values: of the recipe.
        seconds: CPU time.
        per_kind: questions of each kind, of each split.
        folder: of the talker.

    Returns:
        ``parameters`` that trained, ``curve``, and the ``answers``, 1 for a right one, for each split and row of
        :mod:`qlip.evaluation.run.scene_answers`.
    """

    def measures(task: Any) -> tuple[torch.nn.Module, timed.Measure]:
        def measure() -> Sequence[float]:
            found = collect(_chat(task), "seen", PER_POINT, rows=("right", "shuffled"))
            return [100 * float(found.right(row).double().mean()) for row in found.given]

        return task.vlm, measure

    with timed.trained(values, seconds, folder.with_name("running"), measures, POINTS) as done:
        task: Any = done.job.task
        with done.applied():
            task.vlm.eval()
            found = [collect(_chat(task), split, per_kind) for split in SPLITS]
        done.export(folder)
    trained = sum(one.numel() for one in task.vlm.parameters() if one.requires_grad)
    return {"parameters": trained, "curve": done.curve.points, "answers": {one.split: columns(one) for one in found}}


def columns(answers: Answers) -> dict[str, list[int]]:
    """By row, 1 for each question that is answered right."""
    return {row: answers.right(row).int().tolist() for row in answers.given}


def _chat(task: Any) -> Any:
    return answer_of(VisionChat(task.vlm, task.start.tokenizer, task.start.preprocessing))


# ---------------------------------------------------------------- tables


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Format all tables that there are results of, line by line."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = picked(rows, part=part)
        by_variant = {name: picked(own, variant=name) for name in dict.fromkeys(row["variant"] for row in own)}
        yield from ("", f"## {part}", "")
        yield from curve_table(by_variant)
        for split in SPLITS:
            yield ""
            yield from split_table(by_variant, split)
        yield ""
        yield from verdicts(by_variant)


def curve_table(by_variant: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Parameters, speed, and right (shuffled) of each seed at every second point of the curves and at the last."""
    curve = next(iter(by_variant.values()))[0]["curve"]
    numbers = range((len(curve) - 1) % 2, len(curve), 2)
    head = ["", "parameters, M", "answers trained on", "CPU ms per answer"]
    head += [f"{curve[number][0]:.0f} CPU s" for number in numbers]
    yield line(head)
    yield line(["---", *["---:"] * (len(head) - 1)])
    for name, several in by_variant.items():
        last = [row["curve"][-1] for row in several]
        cells = [name, f"{several[0]['parameters'] / 1e6:.2f}", joined([f"{one[1]:,}" for one in last], "; ")]
        cells.append(joined([f"{1000 * one[0] / one[1]:.1f}" for one in last]))
        for number in numbers:
            points = [row["curve"][number] for row in several if number < len(row["curve"])]
            cells.append(joined([f"{one[2]:.0f} ({one[3]:.0f})" for one in points]))
        yield line(cells)


def split_table(by_variant: Mapping[str, Sequence[Row]], split: str) -> Iterator[str]:
    """All questions of a split with the controls, and right (shuffled) by kind, the mean over seeds."""
    some = next(iter(by_variant.values()))[0]["answers"][split]
    count = len(some["right"])
    common, questions = majority(), questions_of(split, count // len(KINDS))
    known = np.array([common[one.kind] == one.answer for one in questions])
    yield line([split.replace("_", " "), "right, %", "shuffled", "blind", *KINDS])
    yield line(["---", *["---:"] * (3 + len(KINDS))])
    by_kind = [f"{100 * known[place :: len(KINDS)].mean():.1f}" for place in range(len(KINDS))]
    yield line(["majority", f"{100 * known.mean():.1f}", "", "", *by_kind])
    for name, several in by_variant.items():
        means = {row: np.mean([one["answers"][split][row] for one in several], 0) for row in some}
        right = share([{"right": one["answers"][split]["right"]} for one in several])
        cells = [name, right, *(f"{100 * means[row].mean():.1f}" for row in ("shuffled", "blind"))]
        for place in range(len(KINDS)):
            own = [100 * means[row][place :: len(KINDS)].mean() for row in ("right", "shuffled")]
            cells.append(f"{own[0]:.1f} ({own[1]:.1f})")
        yield line(cells)


def verdicts(by_variant: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """The first variant against each other one on seen scenes: points, of all seeds and of each, and yes or no."""
    first, *others = by_variant

    def values(row: Row) -> Sequence[float]:
        return [100.0 * one for one in row["answers"]["seen"]["right"]]

    for name in others:
        pairs = [
            (one, other) for one in by_variant[first] for other in by_variant[name] if one["seed"] == other["seed"]
        ]
        by_seed = [float(np.mean(values(one)) - np.mean(values(other))) for one, other in pairs]
        if by_seed:
            said = "yes" if min(by_seed) > 0 else "no"
            seeds = joined([f"{one:+.1f}" for one in by_seed])
            found = paired(by_variant[first], by_variant[name], values)
            yield f"{first} is above {name} in every seed: {said}; {found} points; by seed {seeds}"


# ---------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run parts of the study, then print the tables of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("layers", "towers")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; none prints the tables alone")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results and talkers")
    parser.add_argument("--recipe", default="vlm/nano", help="recipe of the talkers")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changed values of the recipe")
    parser.add_argument("--model", default="bundled", help="QLIP whose layers are compared")
    parser.add_argument("--tower", nargs=2, action="append", default=[], metavar=("NAME", "MODEL"))
    parser.add_argument("--layer", choices=LAYERS, default="layer -2", help="of the part towers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="layers or towers that are trained; all by default")
    parser.add_argument("--projector-lr", nargs="+", type=float, metavar="RATE", help="instead of the recipe's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cpu-seconds", type=float, default=600.0, help="of each training")
    parser.add_argument("--per-kind", type=int, default=PER_KIND, help="questions of each kind, of each split")
    options = parser.parse_args(arguments)
    if wrong := [part for part in options.parts if part not in parts]:
        parser.error(f"{wrong[0]}: no such part; take {', '.join(parts)}")
    if "towers" in options.parts and not options.tower:
        parser.error("towers: name each tower by --tower")
    torch.set_num_threads(1)
    results = timed.Results(options.output / "results.jsonl", KEY)
    if options.parts:
        names = ("recipe", "set", "cpu_seconds", "per_kind")
        work = Workspace(options.output, {name: getattr(options, name) for name in names}, of="study")
        with work.lock():
            work.claim()
            _run(options, results)
    for one in tables(results.rows):
        print(one)


def _run(options: argparse.Namespace, results: timed.Results) -> None:
    """Train what is missing, seed by seed."""
    layer = LAYERS[options.layer]
    variants = {
        "layers": {name: (options.model, one) for name, one in LAYERS.items()},
        "towers": {name: (tower, layer) for name, tower in options.tower},
    }
    for part in options.parts:
        chosen = options.only or list(variants[part])
        if unknown := [name for name in chosen if name not in variants[part]]:
            raise QLIPError(f"--only {unknown[0]}: {part} has {', '.join(variants[part])}")
        for seed, name, rate in itertools.product(options.seeds, chosen, options.projector_lr or [None]):
            called, overrides = name, list(options.set)
            if rate is not None:
                called += f", lr {rate:g}"
                overrides.append(f"optimizer.parts.projector={rate}")
            key = {"kind": "training", "part": part, "variant": called, "seed": seed}
            if results.has(**key):
                continue
            print(f"training {called}, seed {seed}", flush=True)
            folder = options.output / "talkers" / f"{part}-{called.replace(' ', '')}-{seed}"
            values = recipe_of(options.recipe, *variants[part][name], seed, overrides)
            results.add(key | train(values, options.cpu_seconds, options.per_kind, folder))


if __name__ == "__main__":
    main()
