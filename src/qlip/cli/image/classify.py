"""`qlip classify`: images named in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import inputs, options
from qlip.cli.console import Failures, new_table, print_json, print_table, stoppable, usage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.tokens import ImageCodec


def classify(
    images: options.Images,
    labels: Annotated[
        str | None, typer.Option("--labels", "-l", help='What it may be, separated by commas: "cat, dog, fire truck".')
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option("--labels-file", metavar="FILE", help="The same, one label a line.")
    ] = None,
    templates: Annotated[
        str,
        typer.Option(
            help="Prompts averaged for each label: cifar (18), imagenet (80), none (the bare label), "
            "or a file with one a line such as 'a photo of a {}.'"
        ),
    ] = "cifar",
    top: Annotated[int, typer.Option(min=1, help="How many labels to print for each picture.")] = 3,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Name images: which of your labels does each look like?

    An image's class embedding is compared with each label's, averaged over the prompts; the percentages are a softmax
    over your labels at the model's temperature, so they say which of these, not whether any.
    """
    names = _labels(labels, labels_file)
    from qlip.cli import models
    from qlip.cli.image import embed

    found = inputs.find(images, inputs.IMAGE_SUFFIXES, "picture")
    codec, failures = models.load(model, device, dtype), Failures()
    with stoppable("nothing was written"):
        classes = label_vectors(codec, names, templates)
        vectors = embed.embed_images(codec, found, batch_size, failures)
    results = [
        {"input": str(item.path), "labels": ranked(codec, vectors[item], classes, names)}
        for item in found
        if item in vectors
    ]
    if as_json:
        print_json({"model": codec.described(), "templates": templates, "results": results, "failures": failures.found})
    elif results:
        table = new_table("picture", "looks like", "", *["or"] * (min(top, len(names)) > 1))
        for result in results:
            (best, share), *rest = [(entry["label"], entry["probability"]) for entry in result["labels"][:top]]  # type: ignore[index]
            others = ", ".join(f"{label} {probability:.0%}" for label, probability in rest)
            table.add_row(str(result["input"]), best, f"{share:.0%}", *([others] if rest else []))
        print_table(table)
    failures.finish(len(found), "picture")


def label_vectors(codec: ImageCodec, names: Sequence[str], templates: str) -> NDArray[np.float32]:
    """A unit vector for each label, (labels, width): the mean over the prompts' unit vectors, normalised again.

    Raises:
        QLIPError: no such templates, or a line without its ``{}``.
    """
    from qlip.data import load_templates
    from qlip.evaluation.evaluators.text_embeddings import classifier
    from qlip.evaluation.models.base import QLIPEvalModel

    prompts = ("{}",) if templates == "none" else load_templates(templates)
    subject = QLIPEvalModel(codec.model, codec.processor, codec.name)
    vectors: NDArray[np.float32] = classifier(subject, names, prompts).numpy()
    return vectors


def ranked(
    codec: ImageCodec, vector: NDArray[np.float32], classes: NDArray[np.float32], names: Sequence[str]
) -> list[dict[str, str | float]]:
    """All labels of one image, likeliest first, with the softmax of their cosines at the model's temperature."""
    import numpy as np

    cosines = classes @ vector
    logits = cosines * math.exp(codec.model.logit_scale.item())
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return [
        {"label": names[i], "probability": round(float(shares[i]), 6), "cosine": round(float(cosines[i]), 6)}
        for i in np.argsort(-shares, kind="stable")
    ]


def _labels(labels: str | None, labels_file: Path | None) -> list[str]:
    if (labels is None) == (labels_file is None):
        usage_error('give the labels, either --labels "cat, dog" or --labels-file FILE')
    if labels_file is not None:
        try:
            entries = labels_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            usage_error(f"{labels_file}: cannot be read as text ({getattr(error, 'strerror', None) or 'not UTF-8'})")
    else:
        entries = (labels or "").split(",")
    names = list(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))
    if not names:
        usage_error("no label given: name at least one, two or more to choose between")
    return names
