"""CLIP score: the named scorer's cosines, and a model that would judge its own images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation.generation import clip_score
from qlip.evaluation.generation.clip_score import PREFIX
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.modeling.tokenizer import CLIPTokenizer

TEXTS = ["a photo of a cat", "a photo of a dog", "a cup of coffee"]


@pytest.fixture(scope="module")
def scorer() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), "qlip/nano 64")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.open(assets.path("images", f"{name}.jpg")) for name in ("cat", "dog", "coffee")]


def test_clip_score__is_a_hundred_cosines(scorer: QLIPEvalModel, images: list[Image.Image]) -> None:
    done: list[int] = []
    found = clip_score(scorer, iter(images), TEXTS, tokenizer=None, batch_size=2, advance=done.append)
    assert sum(done) == len(TEXTS) and max(done) == 2
    with torch.inference_mode():
        pixels = scorer.processor(images=images)["pixel_values"]
        cosines = (scorer.encode_image(pixels) * scorer.encode_text(TEXTS)).sum(1)
    value = found.values["clip_score_qlip-nano-64"]
    assert value.value == pytest.approx(100 * float(cosines.clamp_min(0).mean()), rel=1e-4) and value.count == 3
    scores = [float(str(row["clip_score_qlip-nano-64"])) for row in found.tables["scores"]]
    assert scores == pytest.approx((100 * cosines.clamp_min(0)).tolist(), rel=1e-4, abs=1e-4)
    assert [row["text"] for row in found.tables["scores"]] == TEXTS
    note = found.notes["clip_score_qlip-nano-64"]
    assert note == f"scored by qlip/nano 64 ({scorer.fingerprint[:16]}), 100 max(cos, 0)"


def test_clip_score__variants_are_named_formulas(scorer: QLIPEvalModel, images: list[Image.Image]) -> None:
    """Hessel's code: 2.5 max(cos, 0) after the prefix; GigaGAN's: the mean cosine after it, negative ones too."""
    texts = ["a photo of a cat", "zzz qqq", "a cup of coffee"]
    with torch.inference_mode():
        seen = scorer.encode_image(scorer.processor(images=images)["pixel_values"])
        cosines = (seen * scorer.encode_text([f"A photo depicts {one}" for one in texts])).sum(1)
    assert cosines.min() < 0
    for variant, expected, note in (
        ("hessel", 2.5 * cosines.clamp_min(0), "2.5 max(cos, 0), captions after 'A photo depicts '"),
        ("gigagan", cosines, "cos, captions after 'A photo depicts '"),
    ):
        found = clip_score(scorer, images, texts, tokenizer=None, variant=variant)
        name = f"clip_score_{variant}_qlip-nano-64"
        assert list(found.values) == [name] and found.notes[name].endswith(f"), {note}")
        assert found.values[name].value == pytest.approx(float(expected.mean()), abs=1e-5)
        assert [row[name] for row in found.tables["scores"]] == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(QLIPError, match=r"clips: no such variant of the CLIP score; there are torchmetrics, hessel"):
        clip_score(scorer, images, texts, tokenizer=None, variant="clips")


@pytest.mark.parametrize("text", ["a cat", "", "a b c d e f", "a b c d e f g", "a b c d e f g h i j k l m n o p"])
def test_clip_score__prefix_gives_the_ids_of_a_splice(text: str) -> None:
    """GigaGAN: three ids behind the begin token, cut at the length, and the end token last where it was cut."""
    length = 12
    tokenizer = CLIPTokenizer.train(["a photo depicts a cat"] * 5, 560, length)
    (ids,) = tokenizer([text])[0].tolist()
    (prefix,) = tokenizer([PREFIX])[0].tolist()
    assert prefix[4] == tokenizer.eos  # three ids
    spliced = [ids[0], *prefix[1:4], *ids[1:]][:length]
    if spliced[-1] != tokenizer.pad:
        spliced[-1] = tokenizer.eos
    assert tokenizer([PREFIX + text])[0].tolist() == [spliced]


def test_clip_score__a_scorer_of_its_own_images_is_said_to_be_one(
    scorer: QLIPEvalModel, images: list[Image.Image]
) -> None:
    other_decoder = scorer.fingerprint[:20] + "0" * 44
    for tokenizer in (scorer, scorer.fingerprint, other_decoder, scorer.model.code_fingerprint):
        found = clip_score(scorer, images[:1], TEXTS[:1], tokenizer=tokenizer)
        assert found.notes["clip_score_qlip-nano-64"].endswith("it judges its own images")
    found = clip_score(scorer, images[:1], TEXTS[:1], tokenizer="f" * 64)
    assert "judges" not in found.notes["clip_score_qlip-nano-64"]


def test_clip_score__images_and_texts_that_are_not_as_many(
    scorer: QLIPEvalModel, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QLIPError, match="CLIP score: more images than the 2 texts; give one for each image"):
        clip_score(scorer, images, TEXTS[:2], tokenizer=None, batch_size=2)
    with pytest.raises(QLIPError, match="CLIP score: 2 images for 3 texts; give one for each image"):
        clip_score(scorer, images[:2], TEXTS, tokenizer=None, batch_size=2)
    with pytest.raises(QLIPError, match="CLIP score: there is no text"):
        clip_score(scorer, images, [], tokenizer=None)
    with pytest.raises(QLIPError, match="image 1: floating pixels must lie in"):
        clip_score(scorer, [images[0], torch.full((3, 8, 8), 9.0)], TEXTS[:2], tokenizer=None)
    monkeypatch.setattr(scorer, "capabilities", frozenset({"encode_image", "reconstruct"}))
    with pytest.raises(QLIPError, match="CLIP score: qlip/nano 64 cannot encode text; choose another scorer"):
        clip_score(scorer, images, TEXTS, tokenizer=None)
