"""Small drawers of made scenes compared by heads, positions, noise and tokenizers: ``python -m benchmarks.drawers``.

Each decoder trains at constant rates for a number of CPU seconds. The averaged weights are measured, so any point of
its curve stands for a training of that length, and one training gives both comparisons: at equal CPU time and at equal
images. Then it draws captions of held-out scenes, which the exact checker scores.

Every finished training and drawing is a line of ``results.jsonl`` in the folder, and is skipped when the command runs
again; tables are printed from what is there. One process with one thread, so that CPU seconds mean the same on a
machine that has other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import drawer_tables, timed
from qlip.archive.dataset.dataset import TokenDataset
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scenes import draw as draw_scene
from qlip.evaluation.evaluators.set_distance import compared
from qlip.evaluation.metrics.statistics import Gathered
from qlip.evaluation.networks import VGG16Features, load
from qlip.evaluation.prompt_suites import draw_suite, scenes, score_scenes
from qlip.lm import Condition, DecoderModel, Sampling
from qlip.lm.guidance import Constant
from qlip.modeling.images import load_image
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.runtime.workspace import Workspace
from qlip.t2i import Drawer, DrawSettings
from qlip.t2i.data import read_rows
from qlip.tokens.image_codec import ImageCodec

Rows = tuple[Tensor, Condition]
"""Indices (B, N, K) of images, and their captions."""
Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""From captions and numbers of scenes to images."""

AT_ONCE = 64
SCALES = (1.0, 2.0, 3.0)
"""Guidance of all trained decoders; the best of them is chosen on seen scenes."""
TEMPERATURE = 0.9
GRID = {"guidance": (1.0, 2.0, 3.0, 5.0), "temperature": (0.7, 0.9, 1.0), "top_k": (0, 16, 4)}


@dataclass(frozen=True)
class Variant:
    """Differences from the base: a chain head, raster positions, clean input.

    Attributes:
        config: keys of the decoder's configuration.
        recipe: sections of the recipe.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


BASE = "chain"
WIDTH, HEADS = 192, 6
VARIANTS = {
    "flat": Variant({"head": {"kind": "flat"}}),
    "parallel": Variant({"head": {"kind": "parallel"}}),
    BASE: Variant(),
    "depth": Variant({"head": {"kind": "depth", "num_layers": 2, "hidden_size": 96}}),
    "bits": Variant({"head": {"kind": "bits"}}),
    "masked_bits": Variant({"head": {"kind": "masked_bits"}}),
    "axial": Variant({"rotary": "axial", "prefix_rotary": "identity"}),
    "1d": Variant({"rotary": "1d"}),
    # nothing turns; embeddings of the places, which a random order of the first step alone asks for
    "learned": Variant(
        {"rotary": "frequencies", "rotary_frequencies": [0.0] * (WIDTH // HEADS // 2)},
        {"random_order": {"start": 0, "end": 1}},
    ),
    "noise-1": Variant(recipe={"input_noise": {"share": 0.01}}),
    "noise-5": Variant(recipe={"input_noise": {"share": 0.05}}),
}
PARTS: dict[str, dict[str, str]] = {
    "heads": {name: f"`{name}`" for name in ("parallel", BASE, "depth", "bits", "masked_bits", "flat")},
    "rotary": {BASE: "`raster`", "axial": "`axial`", "1d": "`1d`", "learned": "learned"},
    "noise": {BASE: "0%", "noise-1": "1%", "noise-5": "5%"},
}
"""Variants of each table, with their titles there."""


KEY = ("kind", "variant", "seed", "split", "guidance", "temperature", "top_k")
"""Columns that tell results apart."""


@dataclass(frozen=True)
class Source:
    """A tokenizer, its tokens of the training scenes, and its tokens of held-out scenes by split."""

    tokenizer: str
    tokens: str
    held_out: dict[str, str]


# ---------------------------------------------------------------- training


@torch.no_grad()
def bits_of(model: DecoderModel, rows: Rows) -> Tensor:
    """Bits of each image, (B,); the model is in eval mode."""
    indices, condition = rows
    parts = torch.arange(len(indices)).split(AT_ONCE)
    nats = [model(indices[part], condition.rows(part.tolist())).sum((1, 2)) for part in parts]
    return torch.cat(nats) / torch.tensor(2.0).log()


def recipe_of(variant: Variant, source: Source, seed: int, batch_size: int) -> dict[str, Any]:
    """Values of a recipe: two million parameters, at rates that stay constant after the warm-up."""
    config = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "intermediate_size": 512,
        "qk_norm": True,
        "rotary": "raster",
        "head": {"kind": BASE},
    }
    return {
        "name": "drawers",
        "task": "t2i",
        "seed": seed,
        "model": {"config": {**config, **variant.config}},
        "data": {"tokens": source.tokens, "condition": "caption"},
        "batch_size": batch_size,
        "precision": "bfloat16",
        "optimizer": {"name": "muon", "muon_lr": 1e-2, "lr": 3e-3, "clip": 1.0, "muon_precision": "bfloat16"},
        "schedule": {"steps": 10**9, "warmup": 100, "floor": 1.0},
        "ema": {"decay": 0.995},
        "threads": 1,
        "tokenizer": source.tokenizer,
        "checkpoint": {"every": 10**9},
        "log": {"every": 200, "tensorboard": False},
        **variant.recipe,
    }


def train(values: dict[str, Any], source: Source, seconds: float, limit: int, folder: Path) -> dict[str, Any]:
    """Train a decoder and export it.

    Args:
        values: of the recipe.
        source: tokenizer and tokens.
        seconds: CPU time.
        limit: held-out images that are measured at the end; a quarter of them before.
        folder: of the drawer.

    Returns:
        ``parameters``, ``curve`` and, for each held-out split, the ``bits`` of its images.
    """

    def measures(task: Any) -> tuple[DecoderModel, timed.Measure]:
        some = rows_of(next(iter(source.held_out.values())), -(-limit // 4), task.tokenizer)
        return task.decoder, lambda: [float(bits_of(task.decoder, some).mean())]

    with timed.trained(values, seconds, folder.with_name("running"), measures) as done:
        task: Any = done.job.task
        model: DecoderModel = task.decoder
        rows = {name: rows_of(path, limit, task.tokenizer) for name, path in source.held_out.items()}
        with done.applied():
            bits = {name: bits_of(model.eval(), one).tolist() for name, one in rows.items()}
        done.export(folder)
        DrawSettings(tokenizer=source.tokenizer, temperature=TEMPERATURE).save(folder)
    return {
        "parameters": model.num_parameters(),
        "curve": done.curve.points,
        "bits": {name: [round(one, 2) for one in values] for name, values in bits.items()},
    }


def bits_by_caption(drawer: Path, tokens: str, limit: int) -> dict[str, float]:
    """Mean bits of held-out images with their own captions and with those of the next image.

    Args:
        drawer: folder.
        tokens: of the images.
        limit: number of images.
    """
    model = DecoderModel.from_pretrained(drawer)
    indices, condition = rows_of(tokens, limit, CLIPTokenizer.from_folder(drawer, model.config.prefix_length))
    own, other = own_and_other_bits(model, (indices, condition))
    return {"own": round(own, 2), "other": round(other, 2)}


@torch.inference_mode()
def own_and_other_bits(model: DecoderModel, rows: Rows) -> tuple[float, float]:
    """Mean bits of images with their own captions, and with those of the next image."""
    indices, condition = rows
    others = condition.rows([*range(1, len(indices)), 0])
    own, other = (float(bits_of(model, (indices, one)).mean()) for one in (condition, others))
    return own, other


def rows_of(tokens: str, limit: int, tokenizer: Any) -> Rows:
    """Read evenly spaced held-out images."""
    return read_rows(TokenDataset(tokens), limit, "caption", tokenizer, (), None)


# ---------------------------------------------------------------- drawing


def score(draw: Draw, split: str, count: int, distance: bool) -> dict[str, Any]:
    """Draw captions of made scenes and check the images.

    Args:
        draw: drawer, or anything else that makes images of captions.
        split: of the scenes.
        count: scenes, the first ones.
        distance: also measure the distance between the sets of drawn and true images.

    Returns:
        ``right``, 0 or 1 for each scene, and ``cpu_ms`` per image; with `distance` also ``fd``: value, interval, note.
    """
    suite = scenes(split, count)
    with TemporaryDirectory(prefix="qlip-drawers-") as folder:
        out, start = Path(folder) / "drawn", time.process_time()
        draw_suite(suite, draw, out, {}, batch_size=AT_ONCE)
        spent = time.process_time() - start
        found = score_scenes(suite, out, None)
        row: dict[str, Any] = {
            "right": [int(one["right"]) for one in found.tables["images"]],
            "cpu_ms": round(1000 * spent / count, 1),
        }
        if distance:
            network = load(VGG16Features.name)
            source = CaptionedScenes(split)
            true = gathered(network, [draw_scene(source.scene(at)[1]) for at in range(count)])
            drawn = gathered(network, [load_image(out / file.path) for file in suite.files])
            sets = compared(network, true, drawn, name=network.name)
            value = sets.values[network.name]
            row["fd"] = [value.value, value.low, value.high, sets.notes.get(network.name, "")]
    return row


@torch.no_grad()
def gathered(network: Any, images: Sequence[Image.Image]) -> Gathered:
    """Features of a set of images."""
    found = Gathered(network.dimensions)
    for first in range(0, len(images), AT_ONCE):
        pixels = np.stack([np.array(one.convert("RGB")) for one in images[first : first + AT_ONCE]])
        found.add(network.features_in_pieces(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255))
    return found


def of_drawer(drawer: Drawer, guidance: float, temperature: float, top_k: int, seed: int) -> Draw:
    """A drawer at a setting."""

    def draw(captions: Sequence[str], numbers: Sequence[int]) -> Sequence[Image.Image]:
        indices = drawer.draw(
            drawer.condition(captions),
            guidance=Constant(guidance),
            sampling=Sampling(temperature, top_k),
            seed=seed,
            numbers=numbers,
        )
        return drawer.images(indices)

    return draw


def of_tokenizer(name: str, split: str) -> Draw:
    """True scenes after a tokenizer: the bound of a drawer of its tokens."""
    codec, source = ImageCodec.from_pretrained(name, device="cpu"), CaptionedScenes(split)

    @torch.inference_mode()
    def draw(captions: Sequence[str], numbers: Sequence[int]) -> Sequence[Image.Image]:
        true = [draw_scene(source.scene(number)[1]) for number in numbers]
        pixels = codec.processor(true)["pixel_values"]
        return codec.processor.to_images(codec.model.decode(codec.model.encode(pixels)))

    return draw


# ---------------------------------------------------------------- parts


class Study:
    """Trains and draws what is missing from the results.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output
        self.drawer: Drawer | None = None
        self.results = timed.Results(self.folder / "results.jsonl", KEY)
        self.bundled = Source("bundled", options.tokens, {"seen": options.seen, "unseen_pair": options.unseen_pair})
        self.twins = {name: Source(model, tokens, {"seen": seen}) for name, model, tokens, seen in options.twin}

    def run(self, part: str) -> None:
        """Do a part, seed by seed."""
        if part == "sampling":
            self._sampling()
            return
        twins = part == "twins"
        sources = self.twins if twins else dict.fromkeys(PARTS[part], self.bundled)
        for name, source in self.twins.items() if twins else [("bundled", self.bundled)]:
            for split in source.held_out:
                self._score(of_tokenizer(source.tokenizer, split), twins, kind="bound", variant=name, split=split)
        for seed in self.options.seeds:
            for name, source in sources.items():
                self._train(name, VARIANTS[BASE if twins else name], source, seed)
                self._listen(name, source, seed)
                for split in source.held_out:
                    for scale in SCALES:
                        setting = (scale, TEMPERATURE, 0)
                        self._draw(self.model(name, seed), name, seed, split, setting, twins)

    def model(self, name: str, seed: int) -> Path:
        """Folder of a drawer."""
        return Path(self.folder / "drawers" / f"{name}-{seed}")

    def _train(self, name: str, variant: Variant, source: Source, seed: int) -> None:
        key = {"kind": "training", "variant": name, "seed": seed}
        if self.results.has(**key):
            return
        options = self.options
        print(f"training {name}, seed {seed}", flush=True)
        values = recipe_of(variant, source, seed, options.batch_size)
        found = train(values, source, options.cpu_seconds, 2 * options.images, self.model(name, seed))
        self.results.add({**key, **found})

    def _listen(self, name: str, source: Source, seed: int) -> None:
        """Measure held-out images of the first split with their captions and with the next image's."""
        key = {"kind": "captions", "variant": name, "seed": seed}
        if self.results.has(**key):
            return
        found = bits_by_caption(self.model(name, seed), next(iter(source.held_out.values())), self.options.images // 2)
        self.results.add({**key, **found})

    def _draw(
        self,
        drawer: str | Path,
        name: str,
        seed: int,
        split: str,
        setting: tuple[float, float, int],
        distance: bool = False,
    ) -> None:
        if self.drawer is None or self.drawer.name != str(drawer):
            self.drawer = Drawer.from_pretrained(drawer, device="cpu")
        key = dict(zip(KEY, ("drawing", name, seed, split, *setting), strict=True))
        self._score(of_drawer(self.drawer, *setting, seed), distance, **key)

    def _score(self, draw: Draw, distance: bool, **key: Any) -> None:
        if self.results.has(**key):
            return
        count = self.options.images * (2 if distance else 1)
        found = score(draw, key["split"], count, distance)
        print(f"{', '.join(map(str, key.values()))}: {sum(found['right'])} of {count} right", flush=True)
        self.results.add({**key, **found})

    def _sampling(self) -> None:
        first = self.model(BASE, self.options.seeds[0])
        drawer, name = self.options.drawer or first, f"sampling:{self.options.drawer or first.name}"
        for setting in product(GRID["guidance"], GRID["temperature"], map(int, GRID["top_k"])):
            self._draw(drawer, name, 0, "seen", setting)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run parts of the study, then print the tables of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*PARTS, "sampling", "twins"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; none prints the tables alone")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results and drawers")
    parser.add_argument("--tokens", default="captioned", help="token dataset of scenes:captioned")
    parser.add_argument("--seen", default="seen", help="token dataset of scenes:seen")
    parser.add_argument("--unseen-pair", default="unseen_pair", help="token dataset of scenes:unseen_pair")
    parser.add_argument("--twin", nargs=4, action="append", default=[], metavar=("NAME", "TOKENIZER", "TOKENS", "SEEN"))
    parser.add_argument("--drawer", help="drawer of the part sampling; by default the first seed's chain")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cpu-seconds", type=float, default=240.0, help="of each training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=400, help="scenes drawn at each setting; twice as many for twins")
    options = parser.parse_args(arguments)
    if wrong := [part for part in options.parts if part not in parts]:
        parser.error(f"{wrong[0]}: no such part; take {', '.join(parts)}")
    if "twins" in options.parts and not options.twin:
        parser.error("twins: name each tokenizer by --twin")
    torch.set_num_threads(1)
    if options.parts:
        names = ("cpu_seconds", "batch_size", "images")
        work = Workspace(options.output, {name: getattr(options, name) for name in names}, of="study")
        with work.lock():
            work.claim()
            study = Study(options)
            for part in options.parts:
                study.run(part)
    rows = timed.Results(options.output / "results.jsonl", KEY).rows
    for line in drawer_tables.tables(rows, PARTS, SCALES):
        print(line)


if __name__ == "__main__":
    main()
