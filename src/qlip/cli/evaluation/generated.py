"""`qlip eval statistics` and `qlip eval generated`: images that were made, against a set of real ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import models, options
from qlip.cli.console import new_table, print_json, print_table, progress, stoppable, usage_error
from qlip.cli.evaluation import eval_models as subjects
from qlip.cli.evaluation import print_results as figures

if TYPE_CHECKING:
    from qlip.data.sources.base import CaptionedImages
    from qlip.evaluation.evaluators.base import MetricResult
    from qlip.evaluation.metrics.statistics import Statistics
    from qlip.evaluation.networks import FeatureNetwork

NONE = "none"
FILE = ".safetensors"


class Network(StrEnum):
    """Networks of features; a Frechet distance is called FID over Inception's alone."""

    vgg16 = "vgg16"
    resnet50 = "resnet50"
    inception = "inception"


HELP_SET = "cifar10:test, a folder, tar shards, PATH#imagenet: real images."
HELP_NETWORK = "Whose features; its weights come with qlip data get lpips, resnet50 or inception."
HELP_RESOLUTION = "Pixels a side: the shorter one is resized to it, the middle cut out."
HELP_AGAINST = (
    "A file of qlip eval statistics, or a set by its name; the set is prepared at the generated images' size."
)
HELP_SCORER = "A model that scores each image by its caption (NAME.txt beside it, or captions.jsonl in the folder)."
HELP_TOKENIZER = (
    "The tokenizer whose tokens were generated, or none: a scorer that judges its own images is told apart."
)


def statistics(
    data: Annotated[str, typer.Argument(metavar="SET", help=HELP_SET)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="To write; ends in .safetensors.")],
    resolution: Annotated[int, typer.Option(min=1, metavar="N", help=HELP_RESOLUTION)],
    network: Annotated[Network, typer.Option(help=HELP_NETWORK)] = Network.vgg16,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first so many images.")] = None,
    batch_size: options.BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Store what a set of real images looks like to a network, to measure generated ones against."""
    from dataclasses import asdict

    if output.suffix != FILE:
        usage_error(f"--output {output}: should end in {FILE}, by which a file of statistics is known")
    made = _statistics(data, (resolution, resolution), _network(network, device), batch_size, workers, limit)
    made.save(output)
    origin = made.origin
    if as_json:
        print_json({"file": str(output)} | asdict(origin))
        return
    table = new_table("file", "network", "set", "n", "preparation", numbers=("n",))
    name, count = str(origin.network["network"]), f"{origin.count:,}"
    table.add_row(str(output), name, origin.source, count, origin.preparation)
    print_table(table)


def generated(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Generated images, all of one size.")],
    against: Annotated[str, typer.Option(metavar="FILE|SET", help=HELP_AGAINST)],
    network: Annotated[Network | None, typer.Option(help="The file's own, or vgg16. " + HELP_NETWORK)] = None,
    expected: Annotated[int | None, typer.Option(min=2, help="Images that there must be, e.g. 50000.")] = None,
    scorer: Annotated[str | None, typer.Option(metavar="MODEL", help=HELP_SCORER)] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help=HELP_TOKENIZER)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")] = None,
    batch_size: options.BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read real images.")] = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure generated images against real ones: Frechet and kernel distance, precision, recall, CLIP score.

    Nothing is resized: the real images are prepared at the size that the generated ones have.
    """
    from qlip.data import FolderImages
    from qlip.evaluation.generation import generated_result, measure_generated
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.report.html import write_report

    if tokenizer is not None and scorer is None:
        usage_error("--tokenizer is for --scorer: who scores the images?")
    source = FolderImages(images, name=str(images))
    texts = _captions(source) if scorer is not None else []
    reference, looked = _reference(against, network, source, device, batch_size, workers)
    with stoppable("nothing was reported"), progress("measuring generated images", len(source)) as bar:
        found = measure_generated(
            source, reference, looked, batch_size=batch_size, expected=expected, advance=bar.advance
        )
    settings = {} if scorer is None else _score(found, source, texts, scorer, tokenizer, device, batch_size)
    where = next(looked.parameters()).device
    result = generated_result(str(images), found, reference.origin, where, settings)
    if output is not None:
        write_bundle(output, result, [found])
        write_report(output)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    figures.print_figures([result])
    if output is not None:
        print(f"\nTo read: {output / 'report.html'}. Beside others: qlip compare {output} ...")


def _network(name: Network, device: str) -> FeatureNetwork:
    from qlip.evaluation.networks import NETWORKS, load

    found = load(dict(zip(Network, NETWORKS, strict=True))[name])
    return found.to(models.pick_device(device))


def _reference(
    against: str, network: Network | None, source: CaptionedImages, device: str, batch_size: int, workers: int
) -> tuple[Statistics, FeatureNetwork]:
    """Real images as a network sees them: from a file, with its network; or of a set, at the first image's size."""
    from qlip.errors import QLIPError
    from qlip.evaluation.metrics.statistics import Statistics
    from qlip.evaluation.networks import NETWORKS
    from qlip.modeling.images import load_image

    if not against.endswith(FILE):
        looked = _network(network or Network.vgg16, device)
        width, height = load_image(source.read(0).image, source.key(0)).size
        return _statistics(against, (height, width), looked, batch_size, workers), looked
    stored = Statistics.load(against)
    own = {name: one for one, name in zip(Network, NETWORKS, strict=True)}.get(str(stored.origin.network["network"]))
    if own is None:
        raise QLIPError(f"{against}: of a network that is not known here, {stored.origin.network['network']}")
    if workers:
        usage_error(f"--workers read real images, and {against} has looked at them; leave it out")
    if network not in (None, own):
        usage_error(f"--network {network}: {against} holds statistics of {own}; leave it out")
    return stored, _network(own, device)


def _statistics(
    data: str, size: tuple[int, int], network: FeatureNetwork, batch_size: int, workers: int, limit: int | None = None
) -> Statistics:
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.evaluation.generation import statistics_of
    from qlip.evaluation.run.datasets import open_set, preparation
    from qlip.modeling import Preprocessing

    prepared = Preprocessing(size, max(size) if size[0] == size[1] else None)
    images = EvalSet(open_set(data), EvalTransform(prepared), limit)
    with stoppable("nothing was written"), progress("looking at real images", len(images)) as bar:
        return statistics_of(
            images,
            prepared,
            network,
            preparation=preparation(prepared),
            batch_size=batch_size,
            num_workers=workers,
            advance=bar.advance,
        )


def _captions(source: CaptionedImages) -> list[str]:
    """What each image was to show."""
    from qlip.errors import QLIPError

    found = []
    for index in range(len(source)):
        captions = source.read(index).captions
        if len(captions) != 1:
            raise QLIPError(
                f"{source.key(index)}: has {len(captions)} captions; a CLIP score needs the one that it was made from,"
                " in a .txt beside it or in captions.jsonl"
            )
        found.append(captions[0])
    return found


def _score(
    found: MetricResult,
    source: CaptionedImages,
    texts: list[str],
    scorer: str,
    tokenizer: str | None,
    device: str,
    batch_size: int,
) -> dict[str, object]:
    """Add the CLIP score; what it depends on."""
    from qlip.evaluation.generation import clip_score
    from qlip.evaluation.models.base import QLIPEvalModel

    judge, _ = subjects.model(scorer, device, options.Dtype.float32, None)
    known = tokenizer not in (None, NONE)
    maker = subjects.model(str(tokenizer), device, options.Dtype.float32, None)[0] if known else None
    images = (source.read(index).image for index in range(len(source)))
    with stoppable("nothing was reported"), progress("scoring images", len(texts)) as bar:
        scored = clip_score(judge, images, texts, tokenizer=maker, batch_size=batch_size, advance=bar.advance)
    if tokenizer is None and isinstance(judge, QLIPEvalModel):
        for name in scored.values:
            scored.notes[name] += "; whose tokens were generated was not said (--tokenizer): it may judge its own"
    found.values |= scored.values
    found.notes |= scored.notes
    found.tables |= scored.tables
    return {"scorer": judge.fingerprint}
