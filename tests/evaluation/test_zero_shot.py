"""Naming images: against scikit-learn, what may be called zero-shot, prompts read once, wrong class lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data.sources.classes import load_classes
from qlip.data.sources.training_text import TrainingText
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators import text_embeddings as wording
from qlip.evaluation.evaluators.registry import evaluator
from qlip.evaluation.evaluators.zero_shot import ZeroShot, draw_confusion, settings_for
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset
from qlip.modeling.model import unit

from .known import Known, rows_of

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing remembered from another test, nothing of this machine's."""
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    wording._MEMORY.clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundled() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


def noisy(model: Known, labels: list[str], noise: float = 3.0) -> torch.Tensor:
    """Embeddings near what their label reads as."""
    draw = torch.Generator().manual_seed(0)
    read = unit(torch.stack([model.vector(f"a {label}") for label in labels]))
    return unit(read + noise * torch.randn(read.shape, generator=draw) / read.shape[1] ** 0.5)


def test_zero_shot__accuracies_and_confusions_are_scikit_learns() -> None:
    model = Known()
    labels = [CLASSES[number] for number in np.random.default_rng(0).integers(0, 7, 60)]
    embeddings = noisy(model, labels)
    found = ZeroShot(templates=["a {}"]).summarize(model, rows_of({"embedding": embeddings}, labels))
    vectors = unit(torch.stack([model.vector(f"a {name}") for name in CLASSES]))
    scores = (embeddings @ vectors.t()).numpy()
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(labels, scores, k=k, labels=CLASSES)
        value = found.values[f"prompt_top{k}"]
        assert value.value == pytest.approx(expected) and 0 < expected < 100
        assert value.low is not None and value.high is not None and value.low < value.value < value.high
        assert (value.count, value.unit) == (60, "%")
    named = [CLASSES[number] for number in scores.argmax(1)]
    expected_matrix = confusion_matrix(labels, named, labels=CLASSES)
    assert np.array_equal(found.arrays["confusion"].numpy(), expected_matrix)
    for record, row in zip(found.tables["classes"], expected_matrix, strict=True):
        number = CLASSES.index(str(record["class"]))
        assert record["pictures"] == row.sum() and record["top1"] == pytest.approx(100 * row[number] / row.sum())
        wrong = np.delete(row, number)
        assert record["times"] == wrong.max()
    json.dumps(found.tables)
    assert found.values["prompt_chance"].value == pytest.approx(100 / 7)
    assert "unknown" in found.notes["protocol"] and not any("zero_shot" in name for name in found.values)


def test_zero_shot__images_without_a_label_take_no_part() -> None:
    model, labels = Known(), ["cat", None, "dog", "red cat", "cat", None]
    embeddings = noisy(model, [label or "nothing" for label in labels], noise=0)
    rows = rows_of({"embedding": embeddings}, labels, chunk=2)
    found = ZeroShot(templates=["a {}"], without=["red"]).summarize(model, rows)
    assert found.values["prompt_top1"].value == 100 and found.values["prompt_top1"].count == 3
    assert found.notes["left out"].startswith("3 images")


def test_zero_shot__a_model_that_says_the_same_of_everything_names_one_class() -> None:
    model = Known()
    rows = rows_of({"embedding": torch.zeros(14, 8)}, CLASSES * 2)
    found = ZeroShot(templates=["a {}"]).summarize(model, rows)
    assert found.values["prompt_top1"].value == pytest.approx(100 / 7)
    assert found.values["prompt_top5"].value == pytest.approx(500 / 7)


def test_zero_shot__the_classifier_is_clips_ensemble_and_read_once(bundled: QLIPEvalModel, cache: Path) -> None:
    names, templates = ("cat", "dog", "ship"), ("{}", "a photo of a {}.")
    expected = []
    for name in names:
        ids = bundled.processor(text=[name, f"a photo of a {name}."])["input_ids"]
        with torch.no_grad():
            expected.append(unit(unit(bundled.model.get_text_features(ids)).mean(0)))
    torch.testing.assert_close(wording.classifier(bundled, names, templates), torch.stack(expected), atol=1e-6, rtol=0)
    model = Known()
    first = wording.classifier(model, names, templates)
    assert model.texts_read == 6 and torch.equal(wording.classifier(model, names, templates), first)
    assert model.texts_read == 6
    wording.classifier(model, names, ("{}!",))
    wording.classifier(Known(fingerprint="1" * 64), names, templates)
    assert model.texts_read == 9 and not (cache / "text_embeddings").exists()


def test_zero_shot__many_prompts_lie_on_disk_block_by_block(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "STORED_FROM", 10)
    monkeypatch.setattr(wording, "CLASSES_AT_ONCE", 3)
    templates = ("{}", "a {}")
    first = wording.classifier(Known(), CLASSES, templates)
    stored = sorted((cache / "text_embeddings").iterdir())
    assert len(stored) == 3
    wording._MEMORY.clear()
    stored[0].unlink()
    stored[1].write_bytes(b"rubbish")
    again = Known()
    assert torch.equal(wording.classifier(again, CLASSES, templates), first)
    assert 2 * 2 <= again.texts_read <= 2 * 6  # two of the blocks, the last of which is one class
    wording._MEMORY.clear()
    texts = [f"text {number}" for number in range(11)]
    expected = wording.text_vectors(Known(), texts)
    wording._MEMORY.clear()
    assert torch.equal(wording.text_vectors(Known(fingerprint="0" * 64), texts), expected)


def test_zero_shot__only_unseen_classes_count_as_zero_shot() -> None:
    model = Known()
    model.training_text = TrainingText.of(["A Cat, asleep", "the doggy", "some ants", "fox"], ["own"])
    embeddings = noisy(model, CLASSES * 3)
    rows = rows_of({"embedding": embeddings}, CLASSES * 3)
    found = ZeroShot(templates=["a {}"]).summarize(model, rows)
    status = {record["class"]: record["trained"] for record in found.tables["classes"]}
    assert status == {name: name in ("cat", "fox") for name in CLASSES}
    assert found.values["trained_classes"].value == 2 and found.values["zero_shot_classes"].value == 5
    # held-out classes among themselves: a literal twin
    held_out = [name for name in CLASSES if not status[name]]
    vectors = unit(torch.stack([model.vector(f"a {name}") for name in held_out]))
    chosen = [number for number, name in enumerate(CLASSES * 3) if name in held_out]
    named = [held_out[int((embeddings[number] @ vectors.t()).argmax())] for number in chosen]
    right = [one == (CLASSES * 3)[number] for one, number in zip(named, chosen, strict=True)]
    assert found.values["zero_shot_top1"].value == pytest.approx(100 * np.mean(right))
    protocol = "prompt accuracy: 2 of 7 class names occur in the training captions (own), 5 do not (zero-shot)"
    assert found.notes["protocol"] == protocol
    model.training_text = TrainingText.of(CLASSES)
    found = ZeroShot(templates=["a {}"]).summarize(model, rows)
    assert found.notes["protocol"].startswith("prompt accuracy on trained classes: all 7")
    assert "zero-shot" not in found.notes["protocol"] and not any(name.startswith("zero") for name in found.values)
    model.training_text = TrainingText.of([])
    found = ZeroShot(templates=["a {}"]).summarize(model, rows)
    assert found.notes["protocol"].startswith("zero-shot accuracy")


def test_zero_shot__an_incomplete_record_leaves_classes_unknown() -> None:
    model = Known()
    model.training_text = TrainingText.of(["a cat"], ["own"], complete=False)
    rows = rows_of({"embedding": noisy(model, CLASSES)}, CLASSES)
    found = ZeroShot(templates=["a {}"]).summarize(model, rows)
    assert found.notes["protocol"].endswith(
        "1 of 7 class names occur in the training captions (own), of 6 it is unknown"
    )
    assert not any(name.startswith("zero") for name in found.values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_zero_shot__what_is_not_finite_names_its_image_or_text(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text tower that gives NaN had 100%: nothing scores higher than NaN."""
    model, embeddings = Known(), torch.ones(7, 8)
    own = model.vector
    monkeypatch.setattr(model, "vector", lambda text: own(text) * (bad if "cat" in text else 1))
    with pytest.raises(QLIPError, match=r"^text 'a cat': embeddings hold NaN; the output of known is broken"):
        ZeroShot(templates=["a {}"]).summarize(model, rows_of({"embedding": embeddings}, CLASSES))
    embeddings[3, 2] = bad
    with pytest.raises(QLIPError, match=r"^003: values of embedding hold"):
        ZeroShot(templates=["a {}"]).summarize(Known(), rows_of({"embedding": embeddings}, CLASSES))


def class_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    return str(path)


def test_zero_shot__own_classes_and_what_prompts_call_them(tmp_path: Path) -> None:
    model = Known()
    labels = ["n1", "n2", "n1"]
    embeddings = noisy(model, ["ant", "bee", "ant"], noise=0)
    path = class_file(tmp_path, "n2\tbee\nn1\tant\n\nn3\tcat\n")
    found = ZeroShot(path, templates=["a {}"]).summarize(model, rows_of({"embedding": embeddings}, labels))
    assert found.values["prompt_top1"].value == 100 and found.values["prompt_classes"].value == 3
    assert found.notes["classes"].startswith("1 of 3 classes are only names to confuse")
    assert [(one["label"], one["class"]) for one in found.tables["classes"]] == [("n2", "bee"), ("n1", "ant")]


def test_zero_shot__wrong_class_lists_are_said_in_a_line(tmp_path: Path) -> None:
    model, rows = Known(), rows_of({"embedding": torch.ones(7, 8)}, CLASSES)
    for text, message in (
        ("ant\nbee\n", r"classes.txt: 2 classes for a set of 7 labels, 'cat' is missing; write one class per line"),
        ("\n".join([*CLASSES[:-1], "new"]), r"has no class 'gnu' \(did you mean 'new'\?\)|has no class 'gnu'"),
        ("ant\nbee\nant\n", "lines 1 and 3 both hold 'ant'"),
        ("a\tant\nb\tant\n", "lines 1 and 2 both hold 'ant'"),
        ("ant\n", "1 classes; classification needs two or more"),
        ("\tant\nbee\n", "line 1 has a name and no label"),
    ):
        with pytest.raises(QLIPError, match=message) as raised:
            ZeroShot(class_file(tmp_path, text)).summarize(model, rows)
        assert "\n" not in str(raised.value)
    for labels, message in (([None] * 7, "carry no labels"), (["cat"] * 7, "carry one label, 'cat'")):
        with pytest.raises(QLIPError, match=message):
            ZeroShot().summarize(model, rows_of({"embedding": torch.ones(7, 8)}, labels))
    with pytest.raises(QLIPError, match="neither 'imagenet' nor a text file"):
        ZeroShot("imagnet")
    with pytest.raises(QLIPError, match="template 'a photo': should hold one"):
        ZeroShot(templates=["a photo"])


def test_zero_shot__imagenets_table_is_whole() -> None:
    table = load_classes("imagenet")
    assert len(table) == 1000 and list(table.labels) == sorted(table.labels)
    assert all(len(label) == 9 and label[0] == "n" for label in table.labels)
    known = {0: "tench", 1: "goldfish", 207: "Golden Retriever", 281: "tabby cat", 517: "construction crane"}
    assert all(table.names[number] == name for number, name in known.items()) and table.labels[0] == "n01440764"
    assert set(table.shared_names()) == {"missile", "sunglasses"}
    assert len(ZeroShot("imagenet").templates) == 80


def test_zero_shot__the_bundled_model_on_the_packages_drawings(bundled: QLIPEvalModel) -> None:
    made = evaluator("zero_shot", templates="cifar")
    assert isinstance(made, ZeroShot)
    data = open_evaluation(str(assets.path("images")), bundled.processor)
    found = evaluate_dataset(bundled, data, [made])
    assert found is not None
    values = found.metric_results["zero_shot"].values
    labelled = [(index, label) for index in range(len(data)) if (label := data.source.read(index).label) is not None]
    names = sorted({label for _, label in labelled})
    vectors = wording.classifier(bundled, names, made.templates)
    first, five = 0, 0
    for index, label in labelled:
        with torch.inference_mode():
            scores = bundled.encode_image(data[index][0][None])[0] @ vectors.t()  # type: ignore[index]
        ranked = [names[at] for at in scores.argsort(descending=True).tolist()]
        first, five = first + (ranked[0] == label), five + (label in ranked[:5])
    expected = {"top1": first, "top5": five, "chance": len(labelled) / len(names)}
    assert {name: values[f"prompt_{name}"].value for name in expected} == pytest.approx(
        {name: 100 * count / len(labelled) for name, count in expected.items()}
    )
    assert values["prompt_classes"].value == len(names) and values["prompt_top1"].count == len(labelled)
    assert json.loads(json.dumps(dict(made.settings())))["templates"][0].count("{}") == 1
    assert settings_for("cifar10:test") == {"templates": "cifar"} and settings_for("somewhere/else") == {}


@pytest.mark.parametrize("count", [3, 60])
def test_zero_shot__a_confusion_matrix_is_drawn(count: int, tmp_path: Path) -> None:
    names = [f"class {number} with a name" for number in range(count)]
    model = Known()
    (tmp_path / "classes.txt").write_text("\n".join([*names, "never seen"]))
    rows = rows_of({"embedding": noisy(model, names * 2, noise=3)}, names * 2)
    found = ZeroShot(str(tmp_path / "classes.txt"), templates=["a {}"]).summarize(model, rows)
    draw_confusion(found, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 400 and (pixels != 255).any(-1).mean() > 0.01
    with pytest.raises(QLIPError, match=r"\(3, 3\) does not fit 2 names"):
        from qlip.evaluation.report.confusion import draw

        draw(torch.zeros(3, 3), ["a", "b"], tmp_path / "x.png")
