"""What a small UM3 gains and loses by its choices: ``python -m benchmarks.um3 softmax calmdown -o DIR``.

Each model, of the recipe ``um3/nano``, trains from scratch at constant rates for a number of CPU seconds, and its
averaged weights are measured in both directions: captions, answers and drawings of held-out scenes, each exactly and
with the controls, and bits per byte of held-out texts. Parts:

    softmax    text and images normalised apart, or together; images by the rows of each group
    shared     the same where the groups of a token share their rows, as in the paper (eq. 6)
    calmdown   share of text as the recipe's calm-down (eq. 7), constant at its last and at its first, and text alone
    rows       visual rows that start at the mean of the text rows, at random, or as sums of their bits' vectors
    stability  QK-norm and z-loss, on and off, at --rate times the recipe's rates
    heads      a position per group of a token, as a UM3 (flat), or per token with a head (chain, depth)
    unity      one model; its halves, which only read or only draw; and the talker vlm/nano and the drawer t2i/scenes,
               with the decoder's sizes and the precision of the recipe

``--set KEY=VALUE...`` changes the recipe's values, as ``qlip train`` does, e.g. ``compile=true``; ``--only NAME...``
trains some variants. Every finished training is a line of ``results.jsonl`` in the folder, and is skipped when the
command runs again; tables are printed from what is there. The recipe itself is a variant of five parts, and trains once
per seed. One process with one thread.
First: ``qlip data get sotu wordnet``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks import timed, um3_tables, vlm_layers
from benchmarks.drawers import own_and_other_bits
from benchmarks.um3_heads import HEADS, HeadedChat, HeadedKind
from qlip.archive.dataset.drawn_scenes import DrawnScenes
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.prompt_suites import draw_suite, scenes, score_scenes
from qlip.evaluation.prompt_suites.run import Draw
from qlip.evaluation.run.scene_answers import collect, questions_of
from qlip.evaluation.run.scene_captions import caption_columns, collect_captions
from qlip.lm.guidance import Constant
from qlip.lm.model import DecoderModel
from qlip.runtime.workspace import Workspace
from qlip.t2i import Drawer, Drawing
from qlip.training.parallel.faults import CollectiveError
from qlip.training.recipe import check_recipe
from qlip.training.recipe_schema import RunRecipe
from qlip.um3.data.config import DataSection
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.drawing import UM3Drawing
from qlip.um3.evaluate import DrawSettings, answer_of, draw_scenes, measure_text, read_documents
from qlip.um3.session import UM3Chat
from qlip.um3.training.recipe import ValidationSection
from qlip.um3.training.validation import LikelihoodHook, held_out_sets

KEY = ("kind", "part", "variant", "seed")
POINTS = 8
Z_LOSS = 1e-4
TALKER, DRAWER = "talker", "drawer"
"""Variants of the part unity that are other models."""
Values = dict[str, Any]
Other = Callable[[argparse.Namespace, int, Path], dict[str, Any]]
"""Trains and measures a model that differs from the recipe's in more than values, by options, seed and folder."""


def variants(part: str, recipe: Values, rate: float) -> dict[str, Values]:
    """Changes of the recipe by variant; the first is what the others are compared with.

    Args:
        part: of the study.
        recipe: values of the recipe.
        rate: factor of the rates of the part stability.
    """
    first, last = recipe["data"]["mixture"]["text"]
    if part in ("softmax", "shared"):
        rows = {"rows": "shared"} if part == "shared" else {}
        return {name: {"model": {"softmax": name} | rows} for name in ("separate", "joint")}
    if part == "rows":
        return {name: {"model": {"row_start": name}} for name in ("mean", "random", "bits")}
    if part == "calmdown":
        alone = {"text": [1, 1], "image_to_text": 0, "text_to_image": 0}
        mixtures = {
            "calm-down": {},
            f"constant {last:g}": {"text": [last, last]},
            f"constant {first:g}": {"text": [first, first]},
            "text alone": alone,
        }
        return {name: {"data": {"mixture": mixture}} for name, mixture in mixtures.items()}
    if part == "stability":
        rates = {name: one * rate for name, one in recipe["optimizer"].items() if name in ("lr", "muon_lr")}
        kinds = {"both": (True, Z_LOSS), "QK-norm": (True, 0.0), "z-loss": (False, Z_LOSS), "neither": (False, 0.0)}
        return {
            name: {"model": {"qk_norm": norm}, "losses": {"z_loss": loss}, "optimizer": rates}
            for name, (norm, loss) in kinds.items()
        }
    if part == "heads":
        return {name: {} for name in ("flat", *HEADS)}
    without = {"one model": {}, "reads alone": {"text_to_image": 0}, "draws alone": {"image_to_text": 0}}
    halves = {name: {"text": [0, 0], **one} if one else {} for name, one in without.items()}
    return {name: {"data": {"mixture": one}} for name, one in halves.items()} | {TALKER: {}, DRAWER: {}}


PARTS = ("softmax", "shared", "calmdown", "rows", "stability", "heads", "unity")


def recipe_of(values: Values, changes: Values, seed: int) -> Values:
    """Values of a recipe with a variant's changes, at constant rates, in one process with one thread."""
    values = _merged(deepcopy(values), changes)
    return timed.constant(values, seed)


def _merged(values: Values, changes: Values) -> Values:
    """Values with changes in place, section by section."""
    both = {
        name: _merged(values[name], one) for name, one in changes.items() if isinstance(one, dict) and name in values
    }
    return {**values, **changes, **both}


# ---------------------------------------------------------------- training


def train(
    values: Values, validation: Values, options: argparse.Namespace, folder: Path, head: str | None = None
) -> dict[str, Any]:
    """Train a UM3, export it, and measure it.

    Args:
        values: of the recipe.
        validation: section of the recipe, whose scenes and texts are held out.
        options: of the command.
        folder: of the model.
        head: of :data:`benchmarks.um3_heads.HEADS`; None is a UM3.

    Returns:
        ``parameters``, ``curve`` of CPU seconds, rows and `um3_tables.FIGURES`, ``text_ids`` trained on, and what
        `measured` returns; of a training that broke ``broke``, its error, and the curve up to there.
    """
    points: list[list[float]] = []

    def measures(task: Any) -> tuple[torch.nn.Module, timed.Measure]:
        section, builder = ValidationSection(**validation), DocumentBuilder(task.um3.config, task.start.tokenizer)
        sets = held_out_sets(section, DataSection(**values["data"]), builder)
        hook = LikelihoodHook(task.um3, task.um3, task.measures, sets, 1)

        def measure() -> Sequence[float]:
            found = {name: one for figures in reversed(hook.measure().values()) for name, one in figures.items()}
            points.append([found[name] for name in um3_tables.FIGURES])
            return points[-1]

        return task.um3, measure

    try:
        scratch, kind = folder.with_name("running"), None if head is None else HeadedKind(head)
        with timed.trained(values, options.cpu_seconds, scratch, measures, POINTS, kind) as done:
            done.export(folder)
    except CollectiveError as error:  # the trainer's: a loss or a gradient that is not finite
        return {"broke": str(error), "curve": [[0.0, 0, *one] for one in points]}
    # apart from blocks that training compiled
    chat = UM3Chat.from_pretrained(folder, device="cpu") if head is None else HeadedChat.from_folder(folder, head)
    rows = done.curve.points[-1][1]
    return {
        "parameters": done.num_parameters,
        "curve": done.curve.points,
        "text_ids": text_ids(values, int(rows)),
        **measured(chat, validation, options),
    }


def text_ids(values: Values, rows: int) -> int:
    """Ids of documents of text in the first rows of a training."""
    section, batch = DataSection(**values["data"]), values["batch_size"]
    return round(section.length * batch * sum(section.shares(step).get("text", 0) for step in range(rows // batch)))


def measured(chat: UM3Chat, validation: Values, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model in both directions.

    Returns:
        ``captions``, ``answers`` and ``drawings``: by row 1 for each that is right, percentages of the controls of
        drawings, and ``text``, bits per byte of each text.
    """
    split = validation["scenes"]
    captions = collect_captions(answer_of(chat), split, options.scenes)
    answers = collect(answer_of(chat), "seen", options.per_kind)
    if isinstance(chat, HeadedChat):
        drawings = draw(UM3Drawing(chat), split, options.scenes)
    else:
        with TemporaryDirectory(prefix="qlip-um3-") as folder:
            drawings = drawings_of(draw_scenes(chat, scenes(split, options.scenes), Path(folder), DrawSettings(), {}))
    texts = {}
    for source in validation["text"]:
        documents = read_documents(source["path"])[: options.documents]
        texts[source["path"]] = measure_text(chat, source["path"], documents)[1].values["bits_per_byte"].value
    return {
        "captions": {row: list(map(int, one)) for row, one in caption_columns(captions).items()},
        "answers": vlm_layers.columns(answers),
        **drawings,
        "text": texts,
    }


def draw(drawing: Draw, split: str, count: int) -> dict[str, Any]:
    """Draw captions of held-out scenes; returns what `drawings_of` does."""
    suite = scenes(split, count)
    with TemporaryDirectory(prefix="qlip-um3-") as folder:
        draw_suite(suite, drawing, Path(folder) / "drawn", {})
        return drawings_of(score_scenes(suite, Path(folder) / "drawn", None))


def drawings_of(found: MetricResult) -> dict[str, Any]:
    """Take ``drawings``, with blind ones where there are, and ``drawing_controls`` from the checker's results."""
    images = found.tables["images"]
    return {
        "drawings": {row: [int(bool(one[row])) for one in images] for row in ("right", "blind") if row in images[0]},
        "drawing_controls": {name: found.values[f"scenes_{name}"].value for name in um3_tables.DRAWING_CONTROLS},
    }


def train_headed(recipe: Values, head: str, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train a model of the recipe with a head of :mod:`benchmarks.um3_heads`; see `train`."""
    return train(recipe_of(recipe, {}, seed), recipe["validation"], options, folder, head)


def as_recipe(values: Values, recipe: Values) -> Values:
    """Values of another task's recipe with this one's sizes of the decoder, precision and compilation."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values["model"]["config"] |= {name: recipe["model"]["config"][name] for name in sizes}
    values["optimizer"]["muon_precision"] = recipe["optimizer"]["muon_precision"]
    return values | {name: recipe[name] for name in ("precision", "compile") if name in recipe}


def train_talker(recipe: Values, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train a talker of the recipe ``vlm/nano``, whose questions alone are measured."""
    values = as_recipe(vlm_layers.recipe_of(options.talker, "bundled", -2, seed), recipe)
    found = vlm_layers.train(values, options.cpu_seconds, options.per_kind, folder)
    return found | {"answers": found["answers"]["seen"], "curve": [point[:2] for point in found["curve"]]}


def train_drawer(recipe: Values, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train a drawer of the recipe ``t2i/scenes``, whose images alone are measured, without guidance."""
    values = as_recipe(recipe_of(timed.load(options.drawer), {}, seed), recipe)
    with timed.trained(
        values, options.cpu_seconds, folder.with_name("running"), lambda task: (task.decoder, list), 1
    ) as done:
        done.export(folder)
    drawer = Drawer.from_pretrained(folder, device="cpu")
    bits = drawer_bits(drawer, folder, recipe["validation"])
    drawings = draw(Drawing(drawer, guidance=Constant(1.0)), recipe["validation"]["scenes"], options.scenes)
    return {"parameters": done.num_parameters, "curve": done.curve.points, "image_bits": bits, **drawings}


def drawer_bits(drawer: Drawer, folder: Path, validation: Values) -> list[float]:
    """Mean bits of held-out scenes' images for a drawer's folder: with their captions, and with the next scenes'."""
    model = DecoderModel.from_pretrained(folder)  # not packed
    scenes = DrawnScenes(validation["scenes"], drawer.codec.name, model.config.group_size)
    batch = scenes.batch(np.arange(validation["num_scenes"]))
    captions = drawer.condition([one[0] for one in batch.captions or ()])
    return list(own_and_other_bits(model, (torch.stack(list(batch.indices)), captions)))


# ---------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run parts of the study, then print the tables of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none prints the tables alone")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results and models")
    parser.add_argument("--recipe", default="um3/nano", help="recipe of the models")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changed values of the recipe")
    parser.add_argument("--talker", default="vlm/nano", help="recipe of the talker of the part unity")
    parser.add_argument("--drawer", default="t2i/scenes", help="recipe of the drawer of the part unity")
    parser.add_argument("--rate", type=float, default=32.0, help="factor of the rates of the part stability")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants that are trained; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cpu-seconds", type=float, default=1200.0, help="of each training")
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes that are described, and drawn")
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind")
    parser.add_argument("--documents", type=int, default=20, help="held-out documents of each text, the first ones")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also write the curves as a PNG")
    options = parser.parse_args(arguments)
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"{wrong[0]}: no such part; take {', '.join(PARTS)}")
    torch.set_num_threads(1)
    results = timed.Results(options.output / "results.jsonl", KEY)
    if options.parts:
        names = ("recipe", "set", "talker", "drawer", "rate", "cpu_seconds", "scenes", "per_kind", "documents")
        work = Workspace(options.output, {name: getattr(options, name) for name in names}, of="study")
        with work.lock():
            work.claim()
            _run(options, results)
    for one in um3_tables.tables(results.rows):
        print(one)
    if options.plot:
        um3_tables.plot(results.rows, options.plot)


def _run(options: argparse.Namespace, results: timed.Results) -> None:
    """Train what is missing, seed by seed; variants of two parts that are one recipe are one training."""
    questions_of("seen", options.per_kind)  # a wrong number is refused before hours of training
    recipe = timed.load(options.recipe, options.set)
    every = {part: variants(part, recipe, options.rate) for part in options.parts}
    names = {name for of_part in every.values() for name in of_part}
    if unknown := [name for name in options.only or () if name not in names]:
        raise QLIPError(f"--only {unknown[0]}: {', '.join(options.parts)} has {', '.join(sorted(names))}")
    others: dict[str, Other] = {TALKER: partial(train_talker, recipe), DRAWER: partial(train_drawer, recipe)}
    others |= {head: partial(train_headed, recipe, head) for head in HEADS}
    trained: list[tuple[RunRecipe, Mapping[str, Any]]] = []
    for part in options.parts:
        for seed in options.seeds:
            for name, changes in every[part].items():
                if options.only and name not in options.only:
                    continue
                key: Mapping[str, Any] = {"kind": "training", "part": part, "variant": name, "seed": seed}
                folder = options.output / "models" / f"{part}-{name.replace(' ', '-')}-{seed}"
                if (other := others.get(name)) is not None:
                    if not results.has(**key):
                        print(f"training {part}, {name}, seed {seed}", flush=True)
                        results.add({**key, **other(options, seed, folder)})
                    continue
                values = recipe_of(recipe, changes, seed)
                checked = check_recipe(values, name)
                if not results.has(**key):
                    found = next((one for own, one in trained if own == checked), None)
                    if found is None:
                        print(f"training {part}, {name}, seed {seed}", flush=True)
                        found = train(values, recipe["validation"], options, folder)
                    results.add({**found, **key})
                trained.append((checked, results.row(**key)))


if __name__ == "__main__":
    main()
