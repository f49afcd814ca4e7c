"""Generated images against a set of real ones (the protocol of gFID): stored statistics, one network, one size.

Generated images must have the size that the statistics are of, for a distance between sets of two preparations says
little about the images. They are resized only where a published protocol does so (`preparation`).
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from qlip.data.loader.eval_set import EvalSet
from qlip.data.public import cache_folder
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.evaluators.set_distance import compared, distance_name
from qlip.evaluation.metrics.pixel import round_to_8_bit
from qlip.evaluation.metrics.statistics import FORMAT, KEPT, Gathered, Origin, Statistics
from qlip.evaluation.networks import FeatureNetwork
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.evaluate import new_result
from qlip.modeling import Preprocessing
from qlip.modeling.images import ImageInput, load_image

GENERATED = "GeneratedPictures"
"""The kind of model in a result of generated images."""
Images = str | Path | CaptionedImages | Iterable[ImageInput]
"""A folder or another path that `open_path` takes, a source, or images one after the other, each as
:func:`qlip.modeling.images.load_image` takes it."""


def check_images(images: CaptionedImages, expected: int | None = None) -> tuple[int, int]:
    """Check number and sizes of generated images by their files' headers, before anything expensive.

    Args:
        images: generated ones.
        expected: images that there must be; None takes two or more.

    Returns:
        (height, width) of all.

    Raises:
        QLIPError: another number of images, one that is none, or images of several sizes.
    """
    _check_count(images.name, len(images), expected)
    first: tuple[str, tuple[int, int]] | None = None
    for name, data in _each(images):
        size = _header_size(data, name)
        first = first or (name, size)
        _check_size(name, size, first)
    assert first is not None
    return first[1][1], first[1][0]


def measure_generated(
    images: Images,
    reference: Statistics,
    network: FeatureNetwork,
    *,
    batch_size: int = 32,
    expected: int | None = None,
    prepared: Preprocessing | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> MetricResult:
    """Frechet distance, kernel distance, precision and recall of generated images.

    Args:
        images: all of one size, that of the reference; none may be broken.
        reference: of real images, by the same network.
        network: on the device it is to run on.
        batch_size: images at once.
        expected: images that there must be, e.g. 50,000; None takes as many as come.
        prepared: resizes and crops them, see :mod:`qlip.evaluation.generation.preparation`; None leaves them as they
            are.
        seed: of what is drawn.
        advance: called with the number of images seen.

    Returns:
        ``gfid`` over Inception, else the network's name; and as
        :func:`qlip.evaluation.evaluators.set_distance.compared` says. The table
        ``sets`` has count and digest of both.

    Raises:
        QLIPError: statistics of another network or size, images of several sizes or that cannot be read, or not as
            many as expected.
    """
    gathered = Gathered(network.dimensions, min(KEPT, reference.origin.kept), seed)
    size: tuple[int, int] | None = None
    for batch in _batches(images, batch_size, prepared):
        if size is None:
            size = (batch.shape[2], batch.shape[3])
            reference.check(network, size)
        _take(gathered, network, batch)
        advance(len(batch))
    count = gathered.moments.count
    _check_count(_named(images), count, expected)
    found = compared(network, reference, gathered, name=distance_name(network, "g"), seed=seed)
    of = reference.origin
    counted = f"{of.count} images" if of.count else "images of unknown number"
    found.notes["reference"] = f"{of.source}: {counted}, {of.preparation}, SHA-256 {of.digest[:16]}"
    found.notes["generated"] = f"{count} images, SHA-256 of their pixels {gathered.digest[:16]}"
    found.tables["sets"] = [
        {"set": "reference", "count": of.count or None, "kept": of.kept, "digest": of.digest},
        {"set": "generated", "count": count, "kept": len(gathered.features), "digest": gathered.digest},
    ]
    return found


def generated_result(
    name: str,
    metric_result: MetricResult,
    reference: Origin,
    device: torch.device,
    settings: Mapping[str, object] = MappingProxyType({}),
    prepared: str = "",
) -> Result:
    """Make a result that can be compared with those of other generators.

    Its fingerprint is that of the generated images, its digest that of the real ones: metrics of one reference, one
    number of images and one network may be compared.

    Args:
        name: name of the generator in tables.
        metric_result: of :func:`measure_generated`, with what else is known of the images.
        reference: what they were measured against.
        device: that computed.
        settings: what other metrics depend on.
        prepared: how generated images were resized, in words; "" if they were left as they are.
    """
    generated = next(one for one in metric_result.tables["sets"] if one["set"] == "generated")
    height, width = reference.size
    row = EvalResult(
        evaluator="generated",
        settings={"reference": asdict(reference), **settings},
        title=name,
        data=reference.source,
        count=int(str(generated["count"])),
        limit=None,
        broken=[],
        preparation=f"{width}x{height}{prepared and ', '}{prepared}; reference: {reference.preparation}",
        as_shipped=True,
        digest=reference.digest,
        values=metric_result.values,
        notes=metric_result.notes,
        tables=metric_result.tables,
    )
    described = {"name": name, "kind": GENERATED, "fingerprint": str(generated["digest"]), "device": device.type}
    return new_result(described, [row], device)


def statistics_of(
    data: EvalSet,
    preprocessing: Preprocessing,
    network: FeatureNetwork,
    *,
    preparation: str,
    kept: int = KEPT,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Compute the statistics of a dataset's features, to compare generated images with.

    Args:
        data: real images, prepared by ``preprocessing``.
        preprocessing: undoes the normalisation.
        network: on the device it is to run on.
        preparation: resize and crop in words, for the file.
        kept: images whose features are kept.
        batch_size, num_workers: of the pass.
        seed: of the draw of those.
        advance: called with the number of images seen.

    Raises:
        QLIPError: an image cannot be read: statistics are of all of a set, or of none.
    """
    gathered = Gathered(network.dimensions, kept, seed)
    for batch in data.batches(batch_size, num_workers):
        if batch.skipped:
            one = batch.skipped[0]
            raise QLIPError(f"{one.key}: {one.reason}; statistics of {data.source.name} need every image")
        pixels = round_to_8_bit(preprocessing.denormalize(batch.pixel_values))
        _take(gathered, network, pixels)
        advance(len(pixels))
    features = gathered.features
    origin = Origin(
        network=network.described(),
        count=gathered.moments.count,
        size=data.transform.size,
        preparation=preparation,
        source=data.source.name,
        digest=gathered.digest,
        kept=len(features),
        seed=seed,
    )
    return Statistics(origin, gathered.moments, features)


def cached_statistics(data: EvalSet, network: FeatureNetwork) -> Path | None:
    """Path in the cache for the statistics of a set; None if it is unknown whether its images change.

    The name depends on the network, the preparation, and the names, sizes and times of all files.
    """
    stamp = data.stamp(range(len(data)))
    if not stamp:
        return None
    key = json.dumps([network.key(), data.transform.preprocessing.fingerprint(), data.source.name, stamp, KEPT, FORMAT])
    return cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _check_count(name: str, count: int, expected: int | None) -> None:
    if count < 2 or expected not in (None, count):
        wanted = "two or more" if expected is None else str(expected)
        raise QLIPError(f"{name}: {wanted} images are needed, got {count}")


def _check_size(name: str, size: tuple[int, int], first: tuple[str, tuple[int, int]]) -> None:
    """Compare (width, height) with the name and size of the first image."""
    if size != first[1]:
        raise QLIPError(
            f"{name}: has {size[0]}x{size[1]} pixels, {first[0]} has {first[1][0]}x{first[1][1]};"
            " generated images are measured at one size"
        )


def _header_size(data: ImageInput, name: str) -> tuple[int, int]:
    """(width, height) of an encoded image as `load_image` orients it, without decoding it where PIL can tell."""
    assert isinstance(data, bytes)
    try:
        with Image.open(io.BytesIO(data)) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (file.height, file.width) if turned else file.size
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError):
        return load_image(data, name).size


def _take(gathered: Gathered, network: FeatureNetwork, pixels: Tensor) -> None:
    """(B, 3, H, W) in [0, 1], of 8 bits."""
    with torch.inference_mode():
        features = network.features_in_pieces(pixels.to(next(network.parameters()).device))
    gathered.add(features, pixels)


def _batches(images: Images, batch_size: int, prepared: Preprocessing | None) -> Iterator[Tensor]:
    """(B, 3, H, W) float32 in [0, 1], all of one size."""
    batch: list[Tensor] = []
    first: tuple[str, tuple[int, int]] | None = None
    for name, given in _each(images):
        image = load_image(given, name)
        if prepared is not None:
            image = prepared.resized(image)
        first = first or (name, image.size)
        _check_size(name, image.size, first)
        batch.append(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _each(images: Images) -> Iterator[tuple[str, ImageInput]]:
    """Images with what errors call them."""
    if isinstance(images, str | Path):
        images = open_path(str(images))
    if isinstance(images, CaptionedImages):
        for index in range(len(images)):
            yield images.key(index), images.read(index).image
    else:
        for number, image in enumerate(images):
            yield f"image {number}", image


def _named(images: Images) -> str:
    if isinstance(images, str | Path):
        return str(images)
    return images.name if isinstance(images, CaptionedImages) else "generated images"
