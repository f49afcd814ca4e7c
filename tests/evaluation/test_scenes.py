"""The checker of made scenes: frozen on drawn, rebuilt and damaged images, and against false captions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from qlip import QLIPModel, QLIPProcessor
from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.public import open_named
from qlip.data.public.scene_captions import CaptionedScenes, Description, contradiction, parse_caption
from qlip.data.public.scenes import HARD, STANDARD, Design, Scene, draw
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.scenes import ScenesRight
from qlip.evaluation.metrics.scenes import SeenScene, SeenThing, is_right, read_scene
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset
from qlip.tokens.image_codec import ImageCodec

Samples = list[tuple[Description, Scene]]


def samples(split: str, count: int) -> Samples:
    source = CaptionedScenes(split)
    return [source.scene(index) for index in range(count)]


def truth(scene: Scene) -> SeenScene:
    """What a scene shows, from the scene itself."""
    sizes = scene.design.sizes
    return SeenScene(
        scene.background,
        tuple(SeenThing(one.shape, one.colour, one.size, sizes[one.size], one.x, one.y, 1.0) for one in scene.things),
    )


def read_all(made: Samples, design: Design, change: Callable[[Image.Image], Image.Image]) -> list[SeenScene]:
    return [read_scene(np.asarray(change(draw(scene))), design) for _, scene in made]


def jpeg(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "jpeg", quality=50)
    return Image.open(data).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    values = np.asarray(image) + np.random.default_rng(0).normal(0, 16, (64, 64, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "drawn": lambda image: image,
    "jpeg": jpeg,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noisy": noisy,
}


@pytest.mark.parametrize("change", CHANGES)
def test_checker__reads_what_was_drawn(change: str) -> None:
    made = samples("seen", 60)
    seen = read_all(made, STANDARD, CHANGES[change])
    assert all(is_right(description, one) for (description, _), one in zip(made, seen, strict=True))


def test_checker__reads_six_shapes() -> None:
    made = samples("hard", 60)
    assert all(is_right(d, one) for (d, _), one in zip(made, read_all(made, HARD, CHANGES["drawn"]), strict=True))


def test_checker__passes_no_false_caption() -> None:
    """False by the scene itself: captions of other scenes, and captions with one change."""
    made = samples("seen", 120) + samples("unseen_relation", 60)
    seen = read_all(made, STANDARD, CHANGES["drawn"])
    for (_, scene), one in zip(made, seen, strict=True):
        for other, _ in made:
            assert is_right(other, one) == is_right(other, truth(scene)), (other.caption, one)
    for (description, scene), one in zip(made, seen, strict=True):
        assert not is_right(contradiction(description), one)
        assert not is_right(contradiction(description), truth(scene))


@pytest.mark.parametrize("count", [pytest.param(100), pytest.param(700, marks=pytest.mark.slow)])
def test_scenes__survive_the_bundled_tokenizer(count: int) -> None:
    """The bound of any drawer with these tokens: at least 99% of 700; no inverted relation passes."""
    codec = ImageCodec.from_pretrained("bundled")
    made = samples("seen", count)
    rebuilt = codec.decode(codec.encode([draw(scene) for _, scene in made]))
    seen = [read_scene(np.asarray(image), STANDARD) for image in rebuilt]
    right = [is_right(description, one) for (description, _), one in zip(made, seen, strict=True)]
    assert np.mean(right) >= 0.99
    assert not any(is_right(contradiction(d), one) for (d, _), one in zip(made, seen, strict=True))


@pytest.mark.parametrize(
    ("caption", "edit"),
    [
        ("a red circle", lambda pixels: pixels * 0),  # nothing
        ("a red circle", lambda pixels: pixels[:, ::-1].copy() // 8),  # too dark to be red
        ("two red circles", lambda pixels: pixels),
        ("a red square", lambda pixels: pixels),
        ("a red circle on white", lambda pixels: pixels),
    ],
)
def test_checker__forgives_nothing(caption: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    scene = next(s for d, s in samples("seen", 400) if d.caption == "a red circle on black")
    assert is_right(parse_caption("a red circle on black"), read_scene(np.asarray(draw(scene)), STANDARD))
    assert not is_right(parse_caption(caption), read_scene(edit(np.asarray(draw(scene))), STANDARD))


def test_checker__of_an_extra_thing_is_no() -> None:
    description, scene = next((d, s) for d, s in samples("seen", 400) if d.family == "two")
    alone = Description("single", description.items[:1])
    assert not is_right(alone, read_scene(np.asarray(draw(scene)), STANDARD))


def test_image__of_another_size_is_refused() -> None:
    with pytest.raises(QLIPError, match="64 x 64 RGB"):
        read_scene(np.zeros((32, 64, 3), np.uint8), STANDARD)


def bundled() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), "bundled")


def test_evaluator__counts_families_and_its_control() -> None:
    model = bundled()
    data = EvalSet(open_named("scenes:seen"), EvalTransform(model.preprocessing), 30)
    found = evaluate_dataset(model, data, [ScenesRight()], batch_size=30)
    assert found is not None
    values = found.metric_results["scenes"].values
    assert values["scenes_right"].value == values["scenes_drawn"].value == 100
    assert values["scenes_contradicted"].value == 0
    assert sum(one.count for name, one in values.items() if name.startswith("scenes_right_")) == 30


def test_evaluator__without_scenes_captions_is_refused() -> None:
    model = bundled()
    data = EvalSet(open_named("scenes:train"), EvalTransform(model.preprocessing), 2)
    with pytest.raises(QLIPError, match="has no caption; evaluate on captioned scenes"):
        evaluate_dataset(model, data, [ScenesRight()])
