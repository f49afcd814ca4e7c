"""Naming pictures by comparing their embedding with prompts, CLIP's way (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlip.data.evalset import EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.protocol import Measurement, preparation
from qlip.modeling import QLIPModel, QLIPProcessor


@torch.no_grad()
def class_embeddings(
    model: QLIPModel, processor: QLIPProcessor, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit vector a class: the mean over templates of the prompts' unit vectors, normalised again.

    Args:
        classes: C names.
        templates: strings with one ``{}`` each.

    Returns:
        (C, E) float32.
    """
    rows = []
    for name in classes:
        text = processor(text=[template.replace("{}", name) for template in templates])
        features = model.get_text_features(text["input_ids"].to(model.device)).float()
        rows.append((features / features.norm(dim=-1, keepdim=True)).mean(0))
    table = torch.stack(rows)
    unit: Tensor = table / table.norm(dim=-1, keepdim=True)
    return unit


@torch.inference_mode()
def measure_classification(
    model: QLIPModel,
    processor: QLIPProcessor,
    data: EvalSet,
    templates: Sequence[str],
    *,
    protocol: str,
    keep: Callable[[str], bool] = lambda label: True,
    batch_size: int = 64,
    num_workers: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Top-1 and top-5 accuracy over the set's own labels.

    Args:
        model: in eval mode.
        processor: of the same checkpoint.
        data: from :func:`qlip.evaluation.open_evaluation`; pictures without a label are left out.
        templates: prompts, averaged for each class.
        protocol: what the figure is called: naming classes seen in training is not zero-shot.
        keep: which labels take part.
        batch_size, num_workers, advance: as for reconstruction.

    Returns:
        ``top1``, ``top5`` and ``chance`` in percent, and the number of ``classes``.

    Raises:
        QLIPError: fewer than two labels take part, or the checkpoint has no vocabulary.
    """
    embeddings, labels, broken = [], [], 0
    for batch in data.batches(batch_size, num_workers):
        broken += len(batch.broken)
        chosen = [i for i, label in enumerate(batch.labels) if label is not None and keep(label)]
        if chosen:
            features = model.get_image_features(batch.pixel_values[chosen].to(model.device, model.dtype)).float()
            embeddings.append(features / features.norm(dim=-1, keepdim=True))
            labels += [label for i in chosen if (label := batch.labels[i]) is not None]
        advance(len(batch) + len(batch.broken))
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise QLIPError(f"{data.source.name}: {len(classes)} labels take part; naming pictures needs two or more")
    scores = torch.cat(embeddings) @ class_embeddings(model, processor, classes, templates).t()
    targets = torch.tensor([classes.index(label) for label in labels], device=scores.device)
    best = scores.topk(min(5, len(classes)), dim=-1).indices == targets[:, None]
    return Measurement(
        protocol,
        data.source.name,
        len(labels),
        broken,
        preparation(processor.preprocessing),
        {
            "top1": 100 * float(best[:, 0].double().mean()),
            "top5": 100 * float(best.any(-1).double().mean()),
            "chance": 100 / len(classes),
            "classes": float(len(classes)),
        },
        {"templates": len(templates)},
    )
