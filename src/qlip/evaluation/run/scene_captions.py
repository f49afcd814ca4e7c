"""Share of made scenes that a model describes rightly, with the controls that show whether it looks.

`collect_captions` asks any model, given as an `Answer` function, for a caption of each scene; `score_captions` reads
them by `qlip.data.public.scene_captions.parse_caption` and holds them against the scenes. A caption is right if it
names all things and all that it says is true; it need not be the scene's own. It is also held against another scene of
its family ("shuffled"), and one caption that was written without an image against all scenes ("blind").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.data.public.scene_captions import FAMILIES, LENGTHS, SPLITS, CaptionedScenes, Description, parse_caption
from qlip.data.public.scenes import SIDE, Scene, draw
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, MetricValue, mean, share_difference
from qlip.evaluation.metrics.captions import caption_scores
from qlip.evaluation.metrics.scenes import is_right, known_scene
from qlip.evaluation.report.result import EvalResult
from qlip.evaluation.run.scene_answers import AT_ONCE, Answer
from qlip.registry import unknown_name
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.workspace import Workspace

ONE_OBJECT = ("single", "size", "position")
"""Families of captions of a single thing."""
TITLES = {
    "captions_right": "right, with their scenes",
    "captions_shuffled": "control: right of the next scene of the family",
    "captions_blind": "control: right, written without an image",
}


@dataclass(frozen=True)
class Captions:
    """Scenes of a split and the captions that a model wrote.

    Attributes:
        split: of the scenes.
        scenes: N descriptions with their scenes.
        given: N captions.
        blind: caption that was written without an image.
    """

    split: str
    scenes: Sequence[tuple[Description, Scene]]
    given: Sequence[str]
    blind: str


def collect_captions(
    answer: Answer,
    split: str = "seen",
    count: int | None = None,
    *,
    batch_size: int = AT_ONCE,
    work: Workspace | None = None,
    on_progress: OnProgress = no_progress,
) -> Captions:
    """Ask a model for captions of a split's scenes.

    Args:
        answer: the model; an empty question asks for a caption.
        split: of :class:`CaptionedScenes`.
        count: number of scenes, the first ones; None takes all.
        batch_size: scenes per call.
        work: folder that keeps finished captions, claimed by the caller; the next call continues there.
        on_progress: called with the number of captions since the last call.

    Raises:
        QLIPError: a wrong split or number, or a model that does not give one caption per scene.
    """
    if split not in SPLITS:
        raise unknown_name(split, "split of scenes", SPLITS)
    source, most = CaptionedScenes(split), LENGTHS[split]
    count = most if count is None else count
    if not 2 <= count <= most:
        raise QLIPError(f"{count:,} scenes: {split} has 2 to {most:,}")
    scenes, given = [source.scene(at) for at in range(count)], list[str]()
    for start in range(0, count, batch_size):
        part, name = scenes[start : start + batch_size], f"captions/{split}-{start:06d}.json"
        if work is not None and work.done(name):
            kept = json.loads(work.read(name))
        else:
            kept = list(answer([draw(scene) for _, scene in part], [""] * len(part)))
            if len(kept) != len(part):
                raise QLIPError(f"the model gave {len(kept)} captions of {len(part)} scenes; give one each")
            if work is not None:
                work.write(name, json.dumps(kept).encode())
        given += kept
        on_progress(len(kept))
    return Captions(split, scenes, given, answer(None, [""])[0])


def fits(caption: str, scene: Scene) -> bool:
    """Return whether a caption is of a made scene, names all its things, and is true of it."""
    description = _read(caption)
    return description is not None and is_right(description, known_scene(scene))


def caption_columns(captions: Captions) -> dict[str, list[bool]]:
    """Return for each scene whether its caption is right, and those of the controls ``shuffled`` and ``blind``."""
    scenes = [scene for _, scene in captions.scenes]
    others = [captions.given[other] for other in shuffled_places([one for one, _ in captions.scenes])]
    return {
        "right": [fits(one, scene) for one, scene in zip(captions.given, scenes, strict=True)],
        "shuffled": [fits(one, scene) for one, scene in zip(others, scenes, strict=True)],
        "blind": [fits(captions.blind, scene) for scene in scenes],
    }


def score_captions(captions: Captions) -> MetricResult:
    """Make metrics of captions, in percent with Wilson's 95% intervals.

    Returns:
        ``captions_right``, ``captions_shuffled`` and ``captions_blind``, each also as ``<row>_<family>`` and
        ``<row>_one_object``; ``captions_above_shuffled``, right minus shuffled in points with the interval of pairs,
        also for one object; ``captions_read``, captions that the parser reads; and the scores of
        :func:`qlip.evaluation.metrics.captions.caption_scores` against the scenes' own captions.
    """
    described, columns = [one for one, _ in captions.scenes], caption_columns(captions)
    found = {f"captions_{name}": torch.tensor(values) for name, values in columns.items()}
    result = MetricResult({})
    for part, picked in _parts(described):
        for name, column in found.items():
            better = "higher" if name == "captions_right" else ""
            if not part and better:
                result.add_mean(name, column, unit="%", better=better, scale=100)
            result.values[name + part] = mean(column[picked], unit="%", better=better, scale=100)
        if part in ("", "_one_object"):
            first, second = (found[f"captions_{name}"][picked] for name in ("right", "shuffled"))
            if (above := share_difference(first, second)) is not None:
                result.values[f"captions_above_shuffled{part}"] = above
    read = torch.tensor([_read(one) is not None for one in captions.given])
    result.values["captions_read"] = mean(read, unit="%", scale=100)
    scores = caption_scores(captions.given, [[one.caption] for one in described])
    for name, value in scores.values.items():
        result.values[name] = MetricValue(value, count=len(described), unit="%", better="higher")
    result.notes = TITLES | dict(scores.notes)
    result.tables["captions"] = [
        {"caption": one.caption, "family": one.family, "given": given, "right": right}
        for one, given, right in zip(described, captions.given, columns["right"], strict=True)
    ]
    result.keep_keys([f"{at:06d}" for at in range(len(described))])
    return result


def shuffled_places(described: Sequence[Description]) -> list[int]:
    """For each scene the place of the next one of its family with another caption; its own if there is none."""
    places = []
    for at, own in enumerate(described):
        following = ((at + step) % len(described) for step in range(1, len(described)))
        others = (
            one for one in following if described[one].family == own.family and described[one].caption != own.caption
        )
        places.append(next(others, at))
    return places


def captions_row(captions: Captions, found: MetricResult, options: dict[str, object]) -> EvalResult:
    """Make a row of a result.

    Args:
        captions: of a split.
        found: :func:`score_captions` of them.
        options: JSON of all that the captions depend on besides the model.
    """
    text = "".join(f"{one.caption}\0{scene}\n" for one, scene in captions.scenes)
    return EvalResult(
        evaluator="scene_captions",
        options=options,
        settings={"split": captions.split},
        title=f"captions of made scenes, {captions.split.replace('_', ' ')}",
        data=f"scenes:{captions.split}",
        count=len(captions.scenes),
        limit=len(captions.scenes),
        broken=[],
        preparation=f"{SIDE}x{SIDE}",
        as_shipped=True,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        values=found.values,
        notes=found.notes,
        tables=found.tables,
    )


def _read(caption: str) -> Description | None:
    """Read a caption; None if the parser does not."""
    try:
        return parse_caption(caption)
    except QLIPError:
        return None


def _parts(described: Sequence[Description]) -> list[tuple[str, Tensor]]:
    """All scenes under "", those of one thing, and those of each family that there is: (N,) bool."""
    families: list[str] = [one.family for one in described]
    parts: dict[str, set[str]] = {
        "": set(families),
        "_one_object": set(ONE_OBJECT),
        **{f"_{one}": {one} for one in FAMILIES},
    }
    found = [(name, torch.tensor([one in some for one in families])) for name, some in parts.items()]
    return [(name, picked) for name, picked in found if picked.any()]
