"""`qlip classify`: zero-shot classification of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import inputs, options
from qlip.cli.console import Failures, new_table, note, print_json, print_table, stoppable, usage_error
from qlip.errors import QLIPError
from qlip.files import read_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qlip.tokens import ImageCodec


def classify(
    images: options.Images,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            "-l",
            help='Labels to choose between, separated by commas: "cat, dog, fire truck". May be repeated.',
        ),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option("--labels-file", metavar="FILE", help="Text file of labels, one per line.")
    ] = None,
    templates: Annotated[
        str,
        typer.Option(
            help="Prompts that are averaged for each label: cifar (18), imagenet (80), none (the label alone), "
            "or a file with one prompt such as 'a photo of a {}.' per line."
        ),
    ] = "cifar",
    top: Annotated[int, typer.Option(min=1, help="Number of labels to print per image.")] = 3,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Classify images zero-shot: which of your labels fits each image best?

    The class embedding of an image is compared with the embedding of each label, averaged over the prompts. The
    percentages are a softmax over your labels at the model's temperature: they rank these labels, and do not tell
    whether any of them is right.
    """
    given = _labels(labels, labels_file)
    from qlip.cli import models
    from qlip.cli.image import embed

    found = inputs.find(images, inputs.IMAGES, "image")
    codec, failures = models.load(model, device, dtype), Failures()
    names = distinct_labels(codec, given)
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
        table = new_table("image", "best label", "", *["others"] * (min(top, len(names)) > 1))
        for result in results:
            (best, share), *rest = [(entry["label"], entry["probability"]) for entry in result["labels"][:top]]  # type: ignore[index]
            others = ", ".join(f"{label} {probability:.0%}" for label, probability in rest)
            table.add_row(str(result["input"]), best, f"{share:.0%}", *([others] if rest else []))
        print_table(table)
    failures.finish(len(found), "image")


def distinct_labels(codec: ImageCodec, names: Sequence[str]) -> list[str]:
    """Labels that the vocabulary tells apart, with a note of the others: ``cat`` and ``Cat`` would share one share."""
    first: dict[tuple[int, ...], str] = {}
    alike = []
    for name, ids in zip(names, codec.processor(text=names).input_ids.tolist(), strict=True):
        if first.setdefault(tuple(ids), name) != name:
            alike.append(f"{name} ({first[tuple(ids)]})")
    if alike:
        note(f"note: labels that are equal to earlier ones for this vocabulary are left out: {', '.join(alike)}")
    return list(first.values())


def label_vectors(codec: ImageCodec, names: Sequence[str], templates: str) -> NDArray[np.float32]:
    """Unit vector of each label, (labels, width): mean of the prompts' unit vectors, normalised again.

    Raises:
        QLIPError: the templates do not exist, or one lacks its ``{}``.
    """
    from qlip.data import load_templates
    from qlip.evaluation.evaluators.text_embeddings import classifier
    from qlip.evaluation.models.base import QLIPEvalModel

    prompts = ("{}",) if templates == "none" else load_templates(templates)
    eval_model = QLIPEvalModel(codec.model, codec.processor, codec.name)
    vectors: NDArray[np.float32] = classifier(eval_model, names, prompts).numpy()
    return vectors


def ranked(
    codec: ImageCodec, vector: NDArray[np.float32], classes: NDArray[np.float32], names: Sequence[str]
) -> list[dict[str, str | float]]:
    """Labels of one image, most probable first, by the softmax of their cosines at the model's temperature."""
    import numpy as np

    cosines = classes @ vector
    logits = cosines * math.exp(codec.model.logit_scale.item())
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return [
        {"label": names[i], "probability": round(float(shares[i]), 6), "cosine": round(float(cosines[i]), 6)}
        for i in np.argsort(-shares, kind="stable")
    ]


def _labels(labels: list[str] | None, labels_file: Path | None) -> list[str]:
    if (labels is None) == (labels_file is None):
        usage_error('give the labels, either --labels "cat, dog" or --labels-file FILE')
    if labels_file is not None:
        try:
            names = list(dict.fromkeys(name for line in read_lines(labels_file) if (name := line.strip())))
        except QLIPError as error:
            usage_error(str(error))
    else:
        names = options.split_list(labels)
    if not names:
        usage_error("no label given: give at least one, or several to choose between")
    return names
