"""`qlip classify`: ranking, prompts and labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip import QLIPModel, QLIPProcessor
from tests.cli.conftest import Command


def test_classify__ranks_by_cosine_with_averaged_prompts(qlip: Command, model: Path, photos: Path) -> None:
    Path("prompts.txt").write_text("a photo of a {}.\nmy {}\n")
    labels = ["cat", "dog", "fire truck"]
    given = ("--labels", "cat, dog,", "-l", "fire truck", "--labels", "cat")
    ran = qlip("classify", photos, *given, "--templates", "prompts.txt", "-m", model, "--json")
    assert ran.code == 0
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    with torch.no_grad():
        vectors = []
        for label in labels:
            inputs = processor(text=[f"a photo of a {label}.", f"my {label}"])
            features = loaded.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            vectors.append(torch.nn.functional.normalize(features, dim=-1).mean(0))
        classes = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
        image = loaded.get_image_features(processor(images=photos / "cat.png")["pixel_values"])
        cosines = classes @ torch.nn.functional.normalize(image, dim=-1)[0]
        shares = (cosines * loaded.logit_scale.exp()).softmax(0)
    first = ran.json["results"][0]["labels"]
    assert [entry["label"] for entry in first] == [labels[i] for i in shares.argsort(descending=True)]
    assert [entry["probability"] for entry in first] == pytest.approx(sorted(shares.tolist(), reverse=True), abs=1e-4)
    assert sum(entry["probability"] for entry in first) == pytest.approx(1, abs=1e-4)


def test_classify__labels_that_the_vocabulary_does_not_tell_apart_count_once(
    qlip: Command, model: Path, photos: Path
) -> None:
    given = ("classify", photos / "cat.png", "-m", model, "--json", "-l", "cat,dog")
    ran = qlip(*given, "-l", "Cat", "-l", "CAT", "-l", "dog ")
    assert ran.json["results"] == qlip(*given).json["results"]
    assert ran.error_lines == [
        "note: labels that are equal to earlier ones for this vocabulary are left out: Cat (cat), CAT (cat)"
    ]


def test_classify__packaged_prompts(qlip: Command, model: Path, photos: Path) -> None:
    shares = []
    for templates in ("cifar", "imagenet", "none"):
        ran = qlip("classify", photos / "cat.png", "-l", "cat,dog", "--templates", templates, "-m", model, "--json")
        shares.append(ran.json["results"][0]["labels"][0]["probability"])
    assert len(set(shares)) == 3
    ran = qlip("classify", photos / "cat.png", "-l", "cat,dog", "--templates", "cifarr", "-m", model)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "cifarr" in ran.err


def test_classify__table_has_the_best_labels(qlip: Command, model: Path, photos: Path) -> None:
    Path("labels.txt").write_text("cat\ndog\n\nship\n")
    ran = qlip(
        "classify", photos / "cat.png", "--labels-file", "labels.txt", "--top", 2, "--templates", "none", "-m", model
    )
    assert ran.code == 0
    heading, line = ran.out.rstrip().splitlines()
    assert "best label" in heading and line.count("%") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the labels"),
        (("--labels", " , "), "no label given"),
        (("--labels-file", "missing.txt"), "missing.txt: No such file or directory"),
        (("--labels", "a", "--labels-file", "b"), "give the labels, either"),
    ],
)
def test_classify__without_usable_labels(
    qlip: Command, model: Path, photos: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = qlip("classify", photos, "-m", model, *arguments)
    assert ran.code == 2 and said in ran.err and len(ran.error_lines) == 1
