"""The task `t2i`: trains on the tokens of bundled images, resumes to the bit, and refuses what does not fit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.manage.merge import merge
from qlip.cli.main import run as qlip
from qlip.data.sources.captions import first_sentence
from qlip.lm import Condition, DecoderModel, Sampling, generate
from qlip.lm.text_encoders import open_text_encoder
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.t2i.data import read_rows
from qlip.t2i.recipe import RandomOrderSection
from qlip.t2i.settings import DrawSettings
from qlip.t2i.task import FIRST_BATCH, T2IKind
from qlip.training import run
from qlip.training.accumulate import backward
from qlip.training.dry_run import dry_run
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from tests.archive.made import made
from tests.training.killed import kill_at_first_checkpoint
from tests.training.ranks import on_ranks

MAIN = "from qlip.cli.main import main\nif __name__ == '__main__':\n    main()\n"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images by the bundled model, with captions."""
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    assert qlip(["tokenize", "bundled", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of three classes, without captions."""
    root = tmp_path_factory.mktemp("labelled")
    (root / "images").mkdir()
    rows = ["file_name,label"]
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 10, 30)).save(root / f"images/{number}.png")
        rows.append(f"{number}.png,{('red', 'green', 'blue')[number % 3]}")
    (root / "images/metadata.csv").write_text("\n".join(rows))
    assert qlip(["tokenize", str(root / "images"), "-o", str(root / "tokens")]) == 0
    return root / "tokens"


@pytest.fixture
def values(tokens: Path) -> dict[str, Any]:
    """Noise, random order, dropout, micro-batches and EMA at once."""
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "head": {"kind": "chain"},
        "residual_dropout": 0.1,
    }
    return {
        "name": "decoder",
        "task": "t2i",
        "model": {"config": config},
        "data": {"tokens": str(tokens)},
        "batch_size": 7,
        "micro_batch_size": 3,
        "condition_dropout": 0.3,
        "input_noise": {"share": 0.1},
        "random_order": {"start": 1, "end": 5},
        "optimizer": {"name": "muon", "lr": 1e-2, "muon_lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"steps": 6, "warmup": 2},
        "ema": {"decay": 0.9},
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 10},
        "log": {"every": 1, "tensorboard": False},
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe without its options."""
    left_out = ("micro_batch_size", "condition_dropout", "input_noise", "random_order")
    return {name: value for name, value in values.items() if name not in left_out}


def train(values: dict[str, Any], folder: Path) -> None:
    run(check_recipe(values, "test"), folder, Console(quiet=True))


def job_of(values: dict[str, Any], folder: Path, quiet: bool = True) -> Any:
    recipe = check_recipe(values, "test")
    torch.manual_seed(0)
    return T2IKind().build(recipe, Parallel(recipe, Console(quiet=quiet, width=200)), folder)  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def test_debug_recipe__trains_by_the_command(tokens: Path, tmp_path: Path) -> None:
    """2 million parameters; the first loss is that of uniform values, and the model can be drawn from."""
    folder = tmp_path / "run"
    assert (
        qlip(["train", "decoder/debug", f"data.tokens={tokens}", "schedule.steps=6", "log.every=1", "-o", str(folder)])
        == 0
    )
    log = [line for line in lines(folder) if "bits_per_image" in line]
    assert log[0]["loss"] == pytest.approx(math.log(2**7), abs=1e-5)
    assert log[0]["bits_per_image"] == pytest.approx(64 * 28, abs=0.1)
    assert log[-1]["bits_per_image"] < log[0]["bits_per_image"] - 10
    model = DecoderModel.from_pretrained(folder / "model")
    assert 2e6 < model.num_parameters() < 2.5e6
    assert model.config.code_fingerprint == QLIPModel.from_pretrained("bundled").code_fingerprint
    assert (folder / "model/tokenizer.json").is_file()
    first = Image.open(folder / FIRST_BATCH)
    assert first.size == (8 * 64, 64) and first.convert("L").getextrema()[1] > 150
    drawn = generate(model, Condition(torch.tensor([[1, 2]])), sampling=Sampling(top_k=20))
    assert QLIPModel.from_pretrained("bundled").decode(drawn).shape == (1, 3, 64, 64)
    assert qlip(["info", str(folder / "model")]) == 0


@pytest.mark.parametrize("kind", ["flat", "parallel", "depth", "bits", "masked_bits"])
def test_heads__all_train_with_their_defaults(values: dict[str, Any], tmp_path: Path, kind: str) -> None:
    values = plain(values)
    values["model"]["config"]["head"] = {"kind": kind}
    job = job_of(values, tmp_path)
    sums = job.task.sums(next(iter(job.feed.open(None)))[0])
    assert float(sum(sums.values()).detach()) / (7 * 64) == pytest.approx(28 * math.log(2), rel=1e-5)


def test_training__beats_its_controls(tokens: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """Memorised captions: fewer bits than independent positions need, and than another image's caption gives."""
    values = plain(values) | {
        "batch_size": 18,
        "schedule": {"steps": 80, "warmup": 5},
        "ema": None,
        "validation": {"tokens": str(tokens), "every": 80},
        "checkpoint": {"every": 100},
    }
    values["model"]["config"] |= {"residual_dropout": 0.0, "num_hidden_layers": 1}
    train(values, tmp_path)
    measured = next(line for line in lines(tmp_path) if line.get("kind") == "validation")
    bits, shuffled = (measured[f"val/tokens/bits_per_image{end}"] for end in ("", "_shuffled"))
    indices = TokenDataset(tokens)[:]
    entropy = 0.0
    for column in indices.flatten(1).T:
        shares = column.bincount().double() / len(column)
        entropy -= float((shares[shares > 0] * shares[shares > 0].log2()).sum())
    assert bits < entropy < 28 * 64
    assert bits < 0.9 * shuffled


def test_resumed__equals_an_uninterrupted_run(values: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 after a checkpoint, and the run resumes to the bit, noise and orders too."""
    script, recipe = tmp_path / "start.py", tmp_path / "recipe.yaml"
    script.write_text(MAIN)
    values |= {"checkpoint": {"every": 1, "keep": 10}, "data": values["data"] | {"short_caption": 0.3}}
    recipe.write_text(json.dumps(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, str(script), "train", str(recipe), "-o", str(tmp_path / name)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    train(values, tmp_path / "whole")
    kill_at_first_checkpoint(start("killed"), tmp_path / "killed")
    again = start("killed")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_ranks__ddp_and_fsdp_equal_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["config"]["residual_dropout"] = 0.0  # ranks have random numbers of their own
    train(values, tmp_path / "one")
    kinds = ("ddp", "fsdp")
    on_ranks(2, train, [(values | {"parallel": {"kind": kind}}, tmp_path / kind) for kind in kinds])
    expected = weights(tmp_path / "one")
    for kind in kinds:
        for name, tensor in weights(tmp_path / kind).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=f"{kind}: {name}")


def test_micro_batches__give_the_gradients_of_the_whole_batch(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["config"]["residual_dropout"] = 0.0
    job = job_of(values, tmp_path)
    job.task.before_step(0)
    for weight in job.task.decoder.head.last_layers():
        torch.nn.init.normal_(weight, std=0.1)
    batch, (phase,) = next(iter(job.feed.open(None)))[0], job.task.phases
    found = []
    for parts in ([batch], batch.split(3), batch.split(9)):  # of the last, two are empty
        backward(phase, parts, True)
        found.append({name: one.grad.clone() for name, one in job.task.model.named_parameters()})
        job.task.model.zero_grad()
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


def batch_of(values: dict[str, Any], folder: Path) -> Any:
    return next(iter(job_of(values, folder).feed.open(None)))[0]


def test_input_noise__changes_inputs_alone(values: dict[str, Any], tmp_path: Path) -> None:
    clean = batch_of(plain(values), tmp_path)
    assert torch.equal(clean.inputs, clean.indices) and clean.order is None
    for unit, expected in (("group", 0.5 * 127 / 128), ("bit", 1 - 0.75**7)):
        noisy = batch_of(plain(values) | {"input_noise": {"share": 0.5, "unit": unit}}, tmp_path)
        assert torch.equal(noisy.indices, clean.indices)
        changed = (noisy.inputs != noisy.indices).double().mean()
        assert float(changed) == pytest.approx(expected, abs=0.05)
        assert noisy.inputs.min() >= 0 and noisy.inputs.max() < 128
    again = batch_of(plain(values) | {"input_noise": {"share": 0.5, "unit": "bit"}}, tmp_path)
    assert torch.equal(again.inputs, noisy.inputs)


def test_conditions__are_dropped_as_often_as_asked(values: dict[str, Any], tmp_path: Path) -> None:
    shares = [
        float(
            batch_of(plain(values) | {"batch_size": 500, "condition_dropout": share}, tmp_path).dropped.double().mean()
        )
        for share in (0.0, 0.3, 1.0)
    ]
    assert shares[0] == 0 and shares[1] == pytest.approx(0.3, abs=0.07) and shares[2] == 1


def test_random_order__is_annealed(values: dict[str, Any], tmp_path: Path) -> None:
    section = RandomOrderSection(start=1, end=5)
    assert [section.share(step) for step in range(7)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    job = job_of(values, tmp_path)
    batch, seen = next(iter(job.feed.open(None)))[0], []
    assert sorted(batch.order[0].tolist()) == list(range(64))
    job.task.network.register_forward_hook(lambda module, args, out: seen.append(args[4]))
    for step in (0, 3, 6):
        job.task.before_step(step)
        job.task.sums(batch)
    raster = [(order == torch.arange(64)).all(1).double().mean() for order in seen]
    assert raster[0] == 0 < raster[1] < raster[2] == 1


def test_classes__are_numbered_by_name(values: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    values = plain(values) | {"data": {"tokens": str(labelled)}}
    train(values, tmp_path)
    config = DecoderModel.from_pretrained(tmp_path / "model").config
    assert config.condition == "class" and config.classes == ("blue", "green", "red")
    batch = batch_of(values, tmp_path / "other")
    assert batch.mask is None and set(batch.values.tolist()) <= {0, 1, 2}


def texts_of(batch: Any, texts: list[str]) -> list[str]:
    """Which of some texts each condition of a batch encodes."""
    ids, _ = QLIPProcessor.from_pretrained("bundled").tokenizer(texts)  # type: ignore[misc]
    return [texts[int((ids == row).all(1).nonzero()[0])] for row in batch.values]


def test_templates__train_labels_and_captions_together(
    values: dict[str, Any], tokens: Path, labelled: Path, tmp_path: Path
) -> None:
    """A label stands in any template where an image has no caption; validation reads the first template."""
    (tmp_path / "templates.txt").write_text("a {} square\nsquare, {}\n")
    both = Layout(str(tmp_path / "both"))
    merge([Layout(str(labelled)), Layout(str(tokens))], both)
    data = {"tokens": both.address, "templates": str(tmp_path / "templates.txt")}
    batch = batch_of(plain(values) | {"data": data, "batch_size": len(TokenDataset(both.address))}, tmp_path)
    captions, _ = TokenDataset(tokens).captions_and_labels(range(len(TokenDataset(tokens))))
    of_labels = [text.format(name) for name in ("red", "green", "blue") for text in ("a {} square", "square, {}")]
    found = texts_of(batch, of_labels + [text for several in captions for text in several])
    assert not batch.skipped and len(set(found) & set(of_labels)) >= 5
    assert sum(text in of_labels for text in found) == 12 and len(found) == 12 + len(captions)
    tokenizer = QLIPProcessor.from_pretrained("bundled").tokenizer
    indices, condition = read_rows(TokenDataset(labelled), 12, "caption", tokenizer, ("a {} square",), None)
    assert torch.equal(indices, TokenDataset(labelled)[:])
    labels = TokenDataset(labelled).captions_and_labels(range(12))[1]
    assert texts_of(condition, of_labels) == [f"a {label} square" for label in labels]
    with pytest.raises(QLIPError, match=r"data.templates is used only with data.condition: caption"):
        check_recipe(values | {"data": data | {"condition": "class"}}, "test")


def test_export__has_the_settings_to_draw_with(
    values: dict[str, Any], tokens: Path, labelled: Path, tmp_path: Path
) -> None:
    """Those of the recipe; without them those of the decoder to start from; with the captions of the classes."""
    drawing = {"guidance": 2.5, "temperature": 0.9, "top_k": 50}
    (tmp_path / "templates.txt").write_text("a {} square\nsquare, {}\n")
    both = Layout(str(tmp_path / "both"))
    merge([Layout(str(labelled)), Layout(str(tokens))], both)
    data = {"tokens": both.address, "templates": str(tmp_path / "templates.txt")}
    train(plain(values) | {"drawing": drawing, "data": data}, tmp_path / "first")
    found = DrawSettings.from_folder(tmp_path / "first/model")
    assert (found.guidance, found.temperature, found.top_k, found.tokenizer) == ("2.5", 0.9, 50, "bundled")
    assert found.classes == {name: f"a {name} square" for name in ("blue", "green", "red")}
    start = {"init": str(tmp_path / "first/model")}
    train(plain(values) | {"model": start}, tmp_path / "second")
    assert DrawSettings.from_folder(tmp_path / "second/model") == found
    train(plain(values) | {"model": start, "drawing": {"guidance": "power:4:2.5"}}, tmp_path / "third")
    third = DrawSettings.from_folder(tmp_path / "third/model")
    assert (third.guidance, third.temperature, third.top_k) == ("power:4:2.5", 0.9, 50)
    with pytest.raises(QLIPError, match="guidance 'powder:4'"):
        check_recipe(values | {"drawing": {"guidance": "powder:4"}}, "test")


def test_vocabulary__is_that_of_the_decoder_to_start_from(values: dict[str, Any], tmp_path: Path) -> None:
    """Not the bundled one, whose ids mean other words."""
    shutil.copytree(assets.path(assets.BUNDLED), tmp_path / "vocabulary")
    own = CLIPTokenizer.train(["a cat and a coffee cup"] * 9, 520, 24)
    own.save(tmp_path / "vocabulary")
    data = values["data"] | {"vocabulary": str(tmp_path / "vocabulary")}
    train(plain(values) | {"data": data, "schedule": {"steps": 1}}, tmp_path / "first")
    job = job_of(plain(values) | {"model": {"init": str(tmp_path / "first/model")}}, tmp_path / "second")
    assert job.task.tokenizer.tokenizer.to_str() == own.tokenizer.to_str()
    assert next(job.feed.open(None))[0].values.max() < own.vocab_size


def test_captions__that_are_not_read_whole_are_counted(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(assets.path(assets.BUNDLED), tmp_path / "vocabulary")
    CLIPTokenizer.train(["q"] * 9, 514, 24).save(tmp_path / "vocabulary")  # a piece per letter
    data = values["data"] | {"vocabulary": str(tmp_path / "vocabulary")}
    job_of(plain(values) | {"data": data}, tmp_path / "run", quiet=False)
    assert re.search(r"tokens: \d+ of the first \d+ captions: longer than the 22 word pieces", capsys.readouterr().out)
    job_of(plain(values), tmp_path / "whole", quiet=False)
    out = capsys.readouterr().out
    assert "first batch, decoded" in out and " captions: " not in out


def test_short_caption__ends_at_the_first_full_stop(values: dict[str, Any], tmp_path: Path) -> None:
    texts = [["a cup. It is 3.5 inches."], ["one sentence"]]
    layout = made(tmp_path / "t", parts=1, rows=20, texts=texts, embedding_dim=None)
    values = plain(values) | {"batch_size": 400, "data": {"tokens": layout.address, "short_caption": 0.3}}
    found = Counter(texts_of(batch_of(values, tmp_path), ["a cup.", texts[0][0], texts[1][0]]))
    assert found["one sentence"] == 200 and found["a cup."] == pytest.approx(60, abs=20)
    assert first_sentence("in version 2.0") == "in version 2.0" and first_sentence(". x") == ". x"


def test_continued__from_a_decoders_folder(
    values: dict[str, Any], tokens: Path, labelled: Path, tmp_path: Path
) -> None:
    train(plain(values), tmp_path / "first")
    model = str(tmp_path / "first/model")
    train(plain(values) | {"model": {"init": model}}, tmp_path / "second")
    assert weights(tmp_path / "second").keys() == weights(tmp_path / "first").keys()
    with pytest.raises(
        QLIPError,
        match=r"no captions; tokenize images with captions, or use data.templates, which make captions",
    ):
        train(plain(values) | {"model": {"init": model}, "data": {"tokens": str(labelled)}}, tmp_path / "third")
    other = made(tmp_path / "other", grid=(8, 8), group_size=7, embedding_dim=None).address
    with pytest.raises(QLIPError, match=r"other: its tokens are of another tokenizer \(cccccccccccc\) than"):
        train(plain(values) | {"model": {"init": model}, "data": {"tokens": other}}, tmp_path / "fifth")
    with pytest.raises(QLIPError, match=r"other: its tokens are of another tokenizer"):
        train(plain(values) | {"validation": {"tokens": other, "every": 1}}, tmp_path / "sixth")
    with pytest.raises(QLIPError, match=r"these data make codebook_size 16384"):
        data = {"tokens": str(tokens), "group_size": 14}
        train(plain(values) | {"model": {"init": model}, "data": data}, tmp_path / "fourth")


def test_text_encoder__its_features_are_the_condition(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder names its encoder, reads features from the cache, and a continued training takes the same encoder."""
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    values = plain(values) | {"schedule": {"steps": 1}, "validation": {"tokens": values["data"]["tokens"], "every": 1}}
    values["data"] |= {"text_encoder": "qlip:bundled"}
    train(values, tmp_path / "first")
    model, encoder = DecoderModel.from_pretrained(tmp_path / "first/model"), open_text_encoder("qlip:bundled")
    assert (model.config.condition, model.config.text_encoder) == ("features", "qlip:bundled")
    assert model.config.text_fingerprint == encoder.fingerprint
    assert not (tmp_path / "first/model/tokenizer.json").exists()
    assert list((tmp_path / "cache/text-features" / encoder.fingerprint).rglob("*.npy"))

    del values["data"]["text_encoder"], values["validation"]
    values["model"] = {"init": str(tmp_path / "first/model")}
    batch = batch_of(values, tmp_path)
    assert batch.values.shape == (7, encoder.length, encoder.size) and batch.mask.sum(1).min() > 2
    with pytest.raises(QLIPError, match=r"qlip:.*other: another text encoder"):
        other = copy_of_bundled(tmp_path / "other")
        job_of(values | {"data": values["data"] | {"text_encoder": f"qlip:{other}"}}, tmp_path)


def copy_of_bundled(folder: Path) -> Path:
    """The bundled model with another text tower."""
    model = QLIPModel.from_pretrained("bundled")
    with torch.no_grad():
        model.text_model.final_layer_norm.bias.add_(1)
    model.save_pretrained(folder)
    QLIPProcessor.from_pretrained("bundled").save_pretrained(folder)
    return folder


def test_dry_run__needs_no_memory(values: dict[str, Any]) -> None:
    report = dry_run(check_recipe(values, "test"))
    assert report is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"size": "LlamaGen-B", "config": {"widht": 3}}}, "unknown key 'widht'"),
        ({"model": {"config": {"grid": [2, 2]}}}, "config.grid follows from the data"),
        ({"model": {}}, "give either init"),
        ({"model": {"size": "LlamaGen-Z"}}, "LlamaGen-Z"),
        ({"random_order": {"start": 3, "end": 3}}, "must be after start"),
        ({"input_noise": {"share": 0}}, "share"),
        ({"data": {"tokens": "absent"}}, "absent"),
        ({"data": {"tokens": "TOKENS", "group_size": 5}}, "group_size 5 does not divide 28 bits"),
        ({"data": {"tokens": "TOKENS", "text_encoder": "qlop:bundled"}}, "qlop:bundled: no such text encoder"),
        ({"data": {"tokens": "TOKENS", "text_encoder": "minilm", "vocabulary": "x"}}, "data.vocabulary is used only"),
        ({"data": {"tokens": "TOKENS", "condition": "none"}}, "condition_dropout is used only with a condition"),
    ],
)
def test_recipe__that_does_not_fit_is_one_line(
    values: dict[str, Any], tokens: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if change.get("data", {}).get("tokens") == "TOKENS":
        change = {"data": change["data"] | {"tokens": str(tokens)}}
    with pytest.raises(QLIPError, match=message) as caught:
        train(values | change, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_classes__of_a_decoder_to_start_from(values: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    """Captions beside labels do not matter then; other classes are refused in one line."""
    train(plain(values) | {"data": {"tokens": str(labelled)}, "schedule": {"steps": 1}}, tmp_path / "first")
    values = plain(values) | {"model": {"init": str(tmp_path / "first/model")}}
    code = TokenDataset(labelled).info.code_fingerprint

    def tokens_of(name: str, texts: list[list[str]]) -> dict[str, Any]:
        options: dict[str, Any] = {"grid": (8, 8), "group_size": 7, "embedding_dim": None, "code_fingerprint": code}
        return {"tokens": made(tmp_path / name, parts=1, rows=6, texts=texts, **options).address}

    batch = batch_of(values | {"data": tokens_of("same", [["red"], ["green"], ["blue"]])}, tmp_path / "second")
    assert batch.mask is None and set(batch.values.tolist()) == {0, 1, 2}
    with pytest.raises(QLIPError, match=r"label 'gren' is none of the 3 classes of .*did you mean 'green'"):
        batch_of(values | {"data": tokens_of("other", [["red"], ["gren"], ["blue"]])}, tmp_path / "third")
    with pytest.raises(QLIPError, match=r"has labels of 2 of the 3 classes of"):
        batch_of(values | {"data": tokens_of("few", [["red"], ["blue"]])}, tmp_path / "fourth")


@pytest.mark.parametrize("change", [{"text_encoder": "qlip:bundled"}, {"short_caption": 0.5}])
def test_captions__are_needed_by_their_settings(
    values: dict[str, Any], labelled: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Not left unread because the images have labels alone."""
    with pytest.raises(
        QLIPError, match=r"its first images have no captions; tokenize images with captions, or use data.templates"
    ):
        batch_of(plain(values) | {"data": {"tokens": str(labelled)} | change}, tmp_path)


def test_dataset__without_what_is_asked_for_is_refused(values: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        QLIPError,
        match=r"no captions; tokenize images with captions, or use data.templates.* data.condition: class",
    ):
        train(plain(values) | {"data": {"tokens": str(labelled), "condition": "caption"}}, tmp_path)


def test_unconditional__has_one_class(values: dict[str, Any], tokens: Path, tmp_path: Path) -> None:
    batch = batch_of(plain(values) | {"data": {"tokens": str(tokens), "condition": "none"}}, tmp_path)
    assert not batch.values.any() and not batch.dropped.any()
