"""Suites of evaluations: ``quick`` for a first look, ``card`` for a model's card, ``full`` for everything.

All on held-out images of the sets that ``qlip data get`` fetches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlip.data.public import DATASETS, read_manifest
from qlip.evaluation.evaluators.throughput import NOISE, THROUGHPUT
from qlip.evaluation.evaluators.zero_shot import settings_for
from qlip.evaluation.run.evaluate import EvalSpec
from qlip.registry import unknown_name

PHOTOGRAPHS, LARGE, EMOJI, CLIPART = "cifar10:test", "wallpapers:test", "emoji:twemoji", "clipart:test"
HELD_OUT = "emoji:twemoji-heldout"
TITLES = {
    PHOTOGRAPHS: "small photographs",
    LARGE: "large photographs, shrunk",
    EMOJI: "emoji of a vendor never seen",
    CLIPART: "clip art",
    HELD_OUT: "emoji concepts held out",
}


def _quick() -> list[EvalSpec]:
    found = [
        EvalSpec(TITLES[data], data, "reconstruction", limit=limit)
        for data, limit in ((PHOTOGRAPHS, 500), (LARGE, None), (EMOJI, 300), (CLIPART, None))
    ]
    found.append(EvalSpec(TITLES[PHOTOGRAPHS], PHOTOGRAPHS, "codebook", limit=500))
    found.append(_zero_shot(PHOTOGRAPHS, 500))
    return [*found, _zero_shot(HELD_OUT, None)]


def _card() -> list[EvalSpec]:
    found = [EvalSpec(TITLES[data], data, "reconstruction") for data in (PHOTOGRAPHS, LARGE, EMOJI, CLIPART)]
    found.append(EvalSpec(TITLES[PHOTOGRAPHS], PHOTOGRAPHS, "codebook"))
    return [*found, _zero_shot(PHOTOGRAPHS, None), _zero_shot(HELD_OUT, None)]


def _full() -> list[EvalSpec]:
    """Everything; metrics that need a feature network take at most 2,000 images per dataset."""
    both, found = {"lpips": ["vgg", "alex"]}, _card()
    for data, limit in ((PHOTOGRAPHS, 2000), (LARGE, None), (EMOJI, 2000), (CLIPART, None)):
        found.append(EvalSpec(f"{TITLES[data]}, by networks", data, "reconstruction", both, limit))
        found.append(EvalSpec(TITLES[data], data, "sets", limit=limit))
        if read_manifest("resnet50") is not None:
            found.append(EvalSpec(TITLES[data], data, "sets_resnet50", limit=limit))
    for data in (HELD_OUT, CLIPART):
        found.append(EvalSpec(TITLES[data], data, "retrieval"))
    probe = {"train": "cifar10:train", "train_limit": 10_000}
    found.append(EvalSpec(TITLES[PHOTOGRAPHS], PHOTOGRAPHS, "probe", probe, limit=2000))
    for name in ("fashion-mnist", "quickdraw"):
        if name in DATASETS and read_manifest(name) is not None:
            found.append(_zero_shot(f"{name}:test", 5000))
    return [*found, throughput_spec()]


def _zero_shot(data: str, limit: int | None) -> EvalSpec:
    return EvalSpec(TITLES.get(data, data), data, "zero_shot", settings_for(data), limit)


_SETS = {"vgg16": "sets", "resnet50": "sets_resnet50", "inception": "sets_fid"}
"""Evaluator of set distances per feature network."""
_WEIGHTS = {"sets": "lpips", "sets_resnet50": "resnet50", "sets_fid": "inception"}
"""Public weights per evaluator of set distances."""
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: ("reconstruction", {})
        for name in ("psnr", "ssim", "ms_ssim", "l1", "bits_per_pixel", "compression_ratio", "shrink_psnr")
    },
    "lpips": ("reconstruction", {"lpips": ["vgg", "alex"]}),
    "lpips_vgg": ("reconstruction", {"lpips": ["vgg"]}),
    "lpips_alex": ("reconstruction", {"lpips": ["alex"]}),
    "rfid": ("sets_fid", {}),
    "kid": ("sets_fid", {}),
    **{f"{kind}_{net}": (_SETS[net], {}) for kind in ("fd", "kd") for net in ("vgg16", "resnet50")},
    **{
        f"{kind}_{net}{'_relu5' if net == 'vgg16' else ''}": (one, {})
        for kind in ("precision", "recall")
        for net, one in _SETS.items()
    },
    **{f"{kind}_top{k}": ("zero_shot", {}) for kind in ("prompt", "zero_shot") for k in (1, 5)},
    **{f"{way}_r{k}": ("retrieval", {}) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    **{name: ("codebook", {}) for name in ("bit_entropy", "group_entropy", "group_usage", "group_perplexity")},
}
"""Evaluator that computes a metric, and the settings that it needs for it."""
SUITES = {"quick": _quick, "card": _card, "full": _full}


def suite(name: str, limit: int | None = None) -> list[EvalSpec]:
    """Return the specs of a suite.

    Args:
        name: ``quick``, ``card`` or ``full``.
        limit: no more images of any set.

    Raises:
        QLIPError: no such suite.
    """
    if name not in SUITES:
        raise unknown_name(name, "suite", SUITES)
    return limited(SUITES[name](), limit)


def public_datasets(specs: Sequence[EvalSpec]) -> list[str]:
    """Return the public datasets and weights that specs need."""
    found = []
    for one in specs:
        sets = [one.data, str(one.settings.get("train", ""))]
        found += [name for name in (data.partition(":")[0] for data in sets) if name in DATASETS]
        if one.settings.get("lpips"):
            found.append("lpips")
        elif one.evaluator in _WEIGHTS and "weights" not in one.settings:
            found.append(_WEIGHTS[one.evaluator])
    return list(dict.fromkeys(found))


def limited(specs: Sequence[EvalSpec], limit: int | None) -> list[EvalSpec]:
    """Limit the number of images per dataset."""
    if limit is None:
        return list(specs)
    return [
        one
        if one.evaluator == THROUGHPUT
        else replace(one, limit=min(limit, limit if one.limit is None else one.limit))
        for one in specs
    ]


def evaluators_of(metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings per evaluator that together compute some metrics, out of `METRICS`.

    Raises:
        QLIPError: no such metric.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name(metric, "metric", METRICS)
        evaluator, settings = METRICS[metric]
        own = found.setdefault(evaluator, {})
        for key, value in settings.items():
            own[key] = list(dict.fromkeys([*own.get(key, []), *value]))
    return found


def with_settings(specs: Sequence[EvalSpec], settings: Mapping[str, Mapping[str, Any]]) -> list[EvalSpec]:
    """Change settings of evaluators.

    Args:
        settings: per evaluator; those of a spec that are not named stay.

    Raises:
        QLIPError: no spec is of such an evaluator.
    """
    names = list(dict.fromkeys(spec.evaluator for spec in specs))
    for name in settings:
        if name not in names:
            raise unknown_name(name, "evaluator in this evaluation", names)
    return [replace(one, settings={**one.settings, **settings.get(one.evaluator, {})}) for one in specs]


def specs_for(data: Sequence[str], evaluators: Sequence[str], limit: int | None = None) -> list[EvalSpec]:
    """Each of some evaluators on each of some sets, with settings that fit the public ones; throughput once."""
    found = [
        EvalSpec(TITLES.get(one, one), one, name, dict(_settings(one, name)), limit)
        for one in data
        for name in evaluators
        if name != THROUGHPUT
    ]
    return [*found, throughput_spec()] if THROUGHPUT in evaluators else found


def probe_spec(data: str, train: str, limit: int | None = None) -> EvalSpec:
    """Probes that learn on one set's features and are tested on another's, at most so many images of each."""
    return EvalSpec(TITLES.get(data, data), data, "probe", {"train": train, "train_limit": limit}, limit)


def throughput_spec() -> EvalSpec:
    """Speed and memory, as one row."""
    return EvalSpec("speed", NOISE, THROUGHPUT)


def _settings(data: str, evaluator: str) -> dict[str, object]:
    if evaluator != "zero_shot":
        return {}
    classes = data.rpartition("#")[2].partition("+")[0] if "#" in data else ""
    return settings_for(data) | ({"classes": classes} if classes else {})
