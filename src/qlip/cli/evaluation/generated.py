"""`qlip eval statistics` and `qlip eval generated`: compare generated images with a set of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import models, options
from qlip.cli.console import new_table, note, print_json, print_table, progress, show, stoppable, usage_error
from qlip.cli.evaluation import eval_models, print_results
from qlip.cli.evaluation.output_folder import check_output

if TYPE_CHECKING:
    from qlip.data.sources.base import CaptionedImages
    from qlip.evaluation.evaluators.base import MetricResult
    from qlip.evaluation.metrics.statistics import Statistics
    from qlip.evaluation.models.base import EvalModel
    from qlip.evaluation.networks import FeatureNetwork
    from qlip.evaluation.report.result import Result
    from qlip.modeling import Preprocessing
    from qlip.modeling.images import ImageInput

NONE = "none"
SUFFIX = ".safetensors"
IMAGES, LISTED = "images", "captions.txt"
"""Folder and list of captions, a line per image in order, of COCO-30k as LlamaGen's scorer reads it."""


class Network(StrEnum):
    """Feature networks; only with Inception is a Frechet distance called FID."""

    vgg16 = "vgg16"
    resnet50 = "resnet50"
    inception = "inception"


class Preparation(StrEnum):
    """Published ways to prepare images for a Frechet distance."""

    own = "own"
    adm = "adm"
    clean_fid = "clean-fid"
    llamagen = "llamagen"


class ClipScore(StrEnum):
    """Formulas of the CLIP score."""

    torchmetrics = "torchmetrics"
    hessel = "hessel"
    gigagan = "gigagan"


HELP_PREPARATION = (
    "How images are prepared. own: real ones resized and cropped, generated ones as they are; adm: real ones by ADM's "
    "centre crop; clean-fid: reference .npz of its mode clean; llamagen: both cropped to squares and resized to 256 "
    "(Lanczos)."
)
HELP_CLIP_SCORE = (
    "Formula of the CLIP score. torchmetrics: 100 max(cos, 0); hessel: 2.5 max(cos, 0), captions after 'A photo "
    "depicts'; gigagan: mean cosine with that prefix, as LlamaGen."
)
HELP_SET = "Set of real images: cifar10:test, a folder, tar shards, or PATH#imagenet."
HELP_NETWORK = "Feature network; its weights are fetched with qlip data get lpips, resnet50 or inception."
HELP_RESOLUTION = "Pixels per side: the shorter side is resized to it, then the centre is cropped."
HELP_REFERENCE = (
    "Real images to compare with: a file of qlip eval statistics, an .npz file of ADM or clean-fid, or a set, which is "
    "prepared at the generated images' size."
)
HELP_SCORER = (
    "Model that computes a CLIP score of each image and its caption (NAME.txt beside it, captions.jsonl in the folder, "
    "or captions.txt with a line per image, in it or beside the folder images)."
)
HELP_TOKENIZER = (
    "Tokenizer whose tokens were generated, or none; the result notes if the scorer and the tokenizer are one model."
)


def statistics(
    data: Annotated[str, typer.Argument(metavar="SET", help=HELP_SET)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File for the statistics; must end in .safetensors.")
    ],
    resolution: Annotated[int, typer.Option(min=1, metavar="N", help=HELP_RESOLUTION)],
    network: Annotated[Network, typer.Option(help=HELP_NETWORK)] = Network.vgg16,
    preparation: Annotated[Preparation, typer.Option(help=HELP_PREPARATION)] = Preparation.own,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Number of images to use, drawn at random; default: all.")
    ] = None,
    batch_size: options.BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.")] = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Store feature statistics of a set of real images, to compare generated ones with."""
    from dataclasses import asdict

    if output.suffix != SUFFIX:
        usage_error(f"--output {output}: must end in {SUFFIX}")
    features = _network(network, device, preparation)
    computed = _statistics(data, (resolution, resolution), features, batch_size, workers, limit, preparation)
    computed.save(output)
    origin = computed.origin
    if as_json:
        print_json({"file": str(output)} | asdict(origin))
        return
    table = new_table("file", "network", "set", "n", "preparation", numbers=("n",))
    name, count = str(origin.network["network"]), f"{origin.count:,}"
    table.add_row(str(output), name, origin.source, count, origin.preparation)
    print_table(table)


def generated(
    images: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder or .npz file of generated images, all of one size.")
    ],
    reference: Annotated[str, typer.Option(metavar="FILE|SET", help=HELP_REFERENCE)],
    network: Annotated[
        Network | None, typer.Option(help=HELP_NETWORK + " Default: the statistics file's network, else vgg16.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, help="Number of images that the folder must hold, such as 50000.")
    ] = None,
    preparation: Annotated[Preparation, typer.Option(help=HELP_PREPARATION)] = Preparation.own,
    scorer: Annotated[str | None, typer.Option(metavar="MODEL", help=HELP_SCORER)] = None,
    clip_formula: Annotated[
        ClipScore | None,
        typer.Option("--clip-score", help=HELP_CLIP_SCORE + " Default: torchmetrics.", show_default=False),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help=HELP_TOKENIZER)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")] = None,
    batch_size: options.BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read real images.")] = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare generated images with real ones: Frechet and kernel distance, precision, recall, CLIP score.

    Generated images are not resized, unless the preparation says so; the real images are prepared at their size.
    """
    from qlip.data.sources.open import open_path
    from qlip.evaluation.generation import check_images, generated_result, measure_generated
    from qlip.evaluation.generation.preparation import described_rule, generated_images
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.report.html import require_packages, write_report

    for option, value in (("tokenizer", tokenizer), ("clip-score", clip_formula)):
        if value is not None and scorer is None:
            usage_error(f"--{option} needs --scorer; give both")
    if output is not None:
        require_packages()
    source = open_path(str(images))
    check_output(output, [str(images), reference], partial(_is_of, str(images), _source_of(reference)))
    size = check_images(source, num_images)
    prepared = generated_images(preparation.value)
    size = size if prepared is None else prepared.size
    texts = _captions(source, images) if scorer is not None else []
    models_of_score = None if scorer is None else _scorer(scorer, tokenizer, device)
    real, features = _reference(reference, network, size, device, batch_size, workers, preparation)
    real.check(features, size)
    with stoppable("nothing was reported"), progress("measuring generated images", len(source)) as bar:
        found = measure_generated(
            source,
            real,
            features,
            batch_size=batch_size,
            expected=num_images,
            prepared=prepared,
            advance=bar.advance,
        )
    settings = dict[str, object]()
    if models_of_score is not None:
        shown = _images_of(source, prepared)
        settings = _score(found, shown, texts, models_of_score, tokenizer, clip_formula, batch_size)
    where = next(features.parameters()).device
    rule = "" if prepared is None else described_rule(prepared.rule)
    result = generated_result(str(images), found, real.origin, where, settings, rule)
    if output is not None:
        write_bundle(output, result, [found])
        write_report(output)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    print_results.print_results([result])
    if output is not None:
        show(f"\nReport: {output / 'report.html'}. Compare with other results: qlip compare {output} ...")


def _network(name: Network, device: str, preparation: Preparation = Preparation.own) -> FeatureNetwork:
    from qlip.evaluation.generation.preparation import CONVENTIONS
    from qlip.evaluation.networks import NETWORKS, load

    convention = CONVENTIONS[preparation.value] if name == Network.inception else None
    found = load(dict(zip(Network, NETWORKS, strict=True))[name], convention=convention)
    return found.to(models.pick_device(device))


def _reference(
    reference: str,
    network: Network | None,
    size: tuple[int, int],
    device: str,
    batch_size: int,
    workers: int,
    preparation: Preparation,
) -> tuple[Statistics, FeatureNetwork]:
    """Return statistics of real images and their network: from a file, or of a set at the generated images' size."""
    from qlip.data.sources.npz import arrays_in
    from qlip.errors import QLIPError
    from qlip.evaluation.metrics.statistics import MOMENTS, Statistics
    from qlip.evaluation.networks import NETWORKS

    if reference.endswith(".npz") and set(MOMENTS) <= set(arrays_in(reference)):
        if workers:
            usage_error(f"--workers needs images to read, and {reference} holds their statistics; leave it out")
        if network not in (None, Network.inception):
            usage_error(f"--network {network}: {reference} holds statistics of inception; leave it out")
        features = _network(Network.inception, device, preparation)
        return Statistics.from_npz(reference, features, size), features
    if not reference.endswith(SUFFIX):
        features = _network(network or Network.vgg16, device, preparation)
        found = _statistics(reference, size, features, batch_size, workers, preparation=preparation, cached=True)
        return found, features
    stored = Statistics.load(reference)
    own = {name: one for one, name in zip(Network, NETWORKS, strict=True)}.get(str(stored.origin.network["network"]))
    if own is None:
        raise QLIPError(f"{reference}: made with an unknown network, {stored.origin.network['network']}")
    if workers:
        usage_error(f"--workers needs images to read, and {reference} holds their statistics; leave it out")
    if network not in (None, own):
        usage_error(f"--network {network}: {reference} holds statistics of {own}; leave it out")
    return stored, _network(own, device, preparation)


def _statistics(
    data: str,
    size: tuple[int, int],
    network: FeatureNetwork,
    batch_size: int,
    workers: int,
    limit: int | None = None,
    preparation: Preparation = Preparation.own,
    cached: bool = False,
) -> Statistics:
    """Compute statistics of a set, or take those in the cache if its images are unchanged."""
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.errors import QLIPError
    from qlip.evaluation.generation import cached_statistics, statistics_of
    from qlip.evaluation.generation.preparation import real_images
    from qlip.evaluation.metrics.statistics import Statistics
    from qlip.evaluation.run.datasets import open_set

    prepared, described = real_images(preparation.value, size)
    images = EvalSet(open_set(data), EvalTransform(prepared), limit)
    path = cached_statistics(images, network) if cached else None
    if path is not None and path.exists():
        note(f"statistics of {data} are taken from {path}")
        return Statistics.load(path)
    with stoppable("nothing was written"), progress("measuring real images", len(images)) as bar:
        found = statistics_of(
            images,
            prepared,
            network,
            preparation=described,
            batch_size=batch_size,
            num_workers=workers,
            advance=bar.advance,
        )
    if path is not None:
        with suppress(QLIPError):  # a cache that cannot be written costs time, nothing else
            found.save(path)
    return found


def _source_of(reference: str) -> str:
    """Name of the real images, as a result has it."""
    from qlip.evaluation.metrics.statistics import Statistics

    return Statistics.load(reference).origin.source if reference.endswith(SUFFIX) else reference


def _is_of(name: str, source: str, stored: Result) -> bool:
    """Return whether a result is of these generated images and real ones."""
    return stored.subject.get("name") == name and [one.data for one in stored.measured] == [source]


def _captions(source: CaptionedImages, images: Path) -> list[str]:
    """Return the caption that each image was generated from."""
    from qlip.errors import QLIPError
    from qlip.files import read_lines

    for listed in (images / LISTED, images.parent / LISTED) if images.name == IMAGES else (images / LISTED,):
        if listed.is_file():
            found = read_lines(listed)
            if len(found) != len(source):
                raise QLIPError(f"{listed}: {len(found)} captions for {len(source)} images; give one line per image")
            return found
    found = []
    for index in range(len(source)):
        captions = source.read(index).captions
        if len(captions) != 1:
            raise QLIPError(
                f"{source.key(index)}: has {len(captions)} captions; a CLIP score needs exactly one,"
                " in a .txt beside the image, in captions.jsonl or in captions.txt"
            )
        found.append(captions[0])
    return found


def _scorer(scorer: str, tokenizer: str | None, device: str) -> tuple[EvalModel, EvalModel | None]:
    """Load the scorer, and the tokenizer if it is known."""
    names = [scorer] if tokenizer in (None, NONE) else [scorer, str(tokenizer)]
    found = [eval_models.model(name, device, options.Dtype.float32, None)[0] for name in names]
    return found[0], found[1] if len(found) > 1 else None


def _images_of(source: CaptionedImages, prepared: Preprocessing | None) -> Iterator[ImageInput]:
    """Iterate over generated images, prepared."""
    for index in range(len(source)):
        image = source.read(index).image
        yield image if prepared is None else prepared.resized(prepared.load(image, source.key(index)))


def _score(
    found: MetricResult,
    images: Iterable[ImageInput],
    texts: list[str],
    loaded: tuple[EvalModel, EvalModel | None],
    tokenizer: str | None,
    formula: ClipScore | None,
    batch_size: int,
) -> dict[str, object]:
    """Add the CLIP score to the metrics; return its settings."""
    from qlip.evaluation.generation import clip_score
    from qlip.evaluation.models.base import QLIPEvalModel

    scoring_model, token_model = loaded
    with stoppable("nothing was reported"), progress("scoring images", len(texts)) as bar:
        scored = clip_score(
            scoring_model,
            images,
            texts,
            tokenizer=token_model,
            variant=str(formula or ClipScore.torchmetrics),
            batch_size=batch_size,
            advance=bar.advance,
        )
    if tokenizer is None and isinstance(scoring_model, QLIPEvalModel):
        for name in scored.values:
            scored.notes[name] += "; without --tokenizer: it may judge its own tokenizer's images"
    found.values |= scored.values
    found.notes |= scored.notes
    found.tables |= scored.tables
    return {"scorer": scoring_model.fingerprint}
