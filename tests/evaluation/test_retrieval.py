"""Retrieval: against a literal twin that sorts everything, at any cutting; shared captions, ties, wrong sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.evaluation.evaluators import retrieval
from qlip.evaluation.evaluators.registry import evaluator
from qlip.evaluation.evaluators.retrieval import Retrieval
from qlip.modeling.model import unit

from .known import Known, rows_of

CAPTIONS = [
    *[(f"image {number}", f"a thing {number}", "shared words")[: 1 + number % 3] for number in range(30)],
    (),
    ("image 3", "image 3", "alone"),
]


def embeddings(model: Known, noise: float = 2.5) -> torch.Tensor:
    texts = [some[0] if some else "none" for some in CAPTIONS]
    near = model.encode_text(texts)
    draw = torch.Generator().manual_seed(0)
    return unit(near + noise * torch.randn(near.shape, generator=draw) / near.shape[1] ** 0.5)


def literal(images: np.ndarray, model: Known, captions: list[tuple[str, ...]]) -> dict[str, float]:
    """Sort everything, look where the first right answer stands."""
    captions = [tuple(dict.fromkeys(some)) for some in captions]
    texts = sorted({text for some in captions for text in some})
    vectors = model.encode_text(texts).numpy()
    used = [row for row, some in enumerate(captions) if some]
    to_text, to_image = [], []
    for row in used:
        order = [texts[at] for at in np.argsort(-(vectors @ images[row]))]
        to_text.append(min(order.index(text) for text in captions[row]))
        for text in captions[row]:
            scores = {other: float(images[other] @ vectors[texts.index(text)]) for other in used}
            ranked = sorted(used, key=lambda other: -scores[other])
            to_image.append(min(ranked.index(other) for other in used if text in captions[other]))
    found = {}
    for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        found |= {f"{name}_r{k}": 100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)}
        found[f"{name}_median_rank"] = 1 + float(np.median(ranks))
    return found


@pytest.mark.parametrize(("chunk", "texts_at_once"), [(7, 5), (50, 8192), (1, 1)])
def test_retrieval__recalls_are_a_literal_twins(
    chunk: int, texts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "TEXTS_AT_ONCE", texts_at_once)
    model = Known()
    images = embeddings(model)
    found = Retrieval().summarize(model, rows_of({"embedding": images}, captions=CAPTIONS, chunk=chunk))
    expected = literal(images.numpy(), model, CAPTIONS)
    assert {name: found.values[name].value for name in expected} == pytest.approx(expected)
    assert 0 < expected["image_to_text_r1"] < 100 and 0 < expected["text_to_image_r1"] < 100
    value = found.values["text_to_image_r5"]
    assert value.low is not None and value.high is not None and value.low < value.value < value.high
    assert value.count == 31 and found.values["captions"].value == sum(len(set(some)) for some in CAPTIONS)
    assert found.notes == {
        "shared captions": "2 texts are captions of several images; all of these count as right",
        "left out": "1 images without a caption",
    }


def clip_benchmark(images: np.ndarray, vectors: np.ndarray, owner: list[int]) -> dict[str, float]:
    """CLIP_benchmark's recalls, with the order of equal scores fixed: every caption is a text of one image."""
    scores = (images.astype(float) @ vectors.T.astype(float)).round(9)  # equal texts score alike
    found: dict[str, float] = {}
    for k in (1, 5, 10):
        to_text = [np.argsort(-row, kind="stable")[:k] for row in scores]
        to_image = [np.argsort(-column, kind="stable")[:k] for column in scores.T]
        found[f"image_to_text_r{k}"] = 100 * float(
            np.mean([any(owner[text] == image for text in some) for image, some in enumerate(to_text)])
        )
        found[f"text_to_image_r{k}"] = 100 * float(np.mean([owner[text] in some for text, some in enumerate(to_image)]))
    return found


@pytest.mark.parametrize(("chunk", "texts_at_once"), [(7, 5), (50, 8192)])
def test_retrieval__repeated_captions_count_as_in_clip_benchmark_by_name(
    chunk: int, texts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "TEXTS_AT_ONCE", texts_at_once)
    model = Known()
    captions = [tuple(f"text {(3 * image + at) % 17}" for at in range(3)) for image in range(30)]
    near = model.encode_text([some[0] for some in captions])
    images = unit(near + 0.1 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0)))
    made = Retrieval(repeated="clip_benchmark")
    found = made.summarize(model, rows_of({"embedding": images}, captions=captions, chunk=chunk))
    owner = [image for image, some in enumerate(captions) for _ in some]
    vectors = model.encode_text([text for some in captions for text in some])
    expected = clip_benchmark(images.numpy(), vectors.numpy(), owner)
    assert {name: found.values[name].value for name in expected} == pytest.approx(expected)
    merged = Retrieval().summarize(model, rows_of({"embedding": images}, captions=captions, chunk=chunk))
    assert merged.values["text_to_image_r1"].value > found.values["text_to_image_r1"].value
    assert made.settings()["repeated"] == "clip_benchmark" and "repeated" not in Retrieval().settings()


def test_retrieval__the_first_captions_and_a_template() -> None:
    model = Known()
    captions = [("one", "two"), ("three",), ("four", "five")]
    images = model.encode_text(["say one", "say three", "say four"])
    made = Retrieval(captions=1, template="say {}")
    found = made.summarize(model, rows_of({"embedding": images}, captions=captions))
    assert found.values["captions"].value == 3 and found.values["text_to_image_r1"].value == 100
    assert found.values["image_to_text_r1"].value == 100
    assert made.settings() == {"captions": 1, "template": "say {}"}


def test_retrieval__a_model_that_scores_all_alike_finds_nothing() -> None:
    captions = [(f"{number}",) for number in range(20)]
    found = Retrieval().summarize(Known(), rows_of({"embedding": torch.zeros(20, 8)}, captions=captions))
    assert all(found.values[f"{way}_r10"].value == 0 for way in ("image_to_text", "text_to_image"))


def test_retrieval__what_is_wrong_is_said_in_a_line() -> None:
    with pytest.raises(QLIPError, match="1 images have a caption; it needs two or more"):
        Retrieval().summarize(Known(), rows_of({"embedding": torch.ones(2, 8)}, captions=[("a",), ()]))
    with pytest.raises(QLIPError, match="captions 0: at least one"):
        evaluator("retrieval", captions=0)
    with pytest.raises(QLIPError, match="template 'x': should hold one"):
        evaluator("retrieval", template="x")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_retrieval__what_is_not_finite_names_its_image_or_text(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions read as NaN used to be found in all cases."""
    model, captions, images = Known(fingerprint=f"broken {bad}"), [("a cat",), ("a dog",)], torch.ones(2, 8)
    own = model.vector
    monkeypatch.setattr(model, "vector", lambda text: own(text) * (bad if "dog" in text else 1))
    with pytest.raises(QLIPError, match=r"^text 'a dog': embeddings hold NaN"):
        Retrieval().summarize(model, rows_of({"embedding": images}, captions=captions))
    images[1, 0] = bad
    with pytest.raises(QLIPError, match=r"^001: values of embedding hold"):
        Retrieval().summarize(Known(), rows_of({"embedding": images}, captions=captions))
