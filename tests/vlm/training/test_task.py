"""The task `vlm`: both stages train, resume to the bit, and keep frozen networks out of checkpoints."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from qlip import QLIPError
from qlip.cli.main import run as qlip
from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.lm.sampling import AnswerSettings
from qlip.training.accumulate import backward
from qlip.training.dry_run import dry_run
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.state.dcp_safetensors import read_index
from qlip.vlm.images import pixels_of
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.training.question_feed import question_at
from qlip.vlm.training.task import VLMKind
from tests.lm.tokenizers import made
from tests.training.ranks import on_ranks
from tests.vlm.conftest import TEXT, train


def job_of(values: dict[str, Any], folder: Path = Path(), console: Console | None = None) -> Any:
    recipe = check_recipe(values, "test")
    torch.manual_seed(0)
    return VLMKind().build(recipe, Parallel(recipe, console or Console(quiet=True)), folder)  # type: ignore[arg-type]


def stage2(stage1: dict[str, Any], init: Path, **changes: Any) -> dict[str, Any]:
    values = stage1 | {"name": "stage2", "model": {"init": str(init)}, "train": ["projector", "llm"]}
    return values | {"optimizer": {"lr": 1e-3, "parts": {"projector": 5e-3}}} | changes


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    left_out = ("samples_per_s", "data_wait", "peak_memory_gib", "seconds_left", "time")
    return [{key: value for key, value in line.items() if key not in left_out} for line in found]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(one, second[name]) for name, one in first.items())


def resumed(values: dict[str, Any], folder: Path) -> Path:
    """Copy of a finished run as it was stopped after half of its steps, run to its end."""
    again = folder.with_name("again")
    shutil.copytree(folder, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints/step-00000004")
    train(values, again)
    return again


def test_stages__resume_to_the_bit_and_keep_frozen_networks_out(stage1: dict[str, Any], tmp_path: Path) -> None:
    first = train(stage1, tmp_path / "one/run")
    again = resumed(stage1, tmp_path / "one/run")
    assert equal(weights(first), weights(again / "model"))
    assert lines(tmp_path / "one/run") == lines(again)
    assert {name.partition(".")[0] for name in weights(first)} == {"projector"}
    index = read_index(tmp_path / "one/run/checkpoints/step-00000004/training")
    assert all("projector." in name for name in index)
    state = json.loads((tmp_path / "one/run/checkpoints/step-00000004/training/state.json").read_text())
    assert state["frozen"].keys() == {"tower", "llm"}

    values = stage2(stage1, first)
    second = train(values, tmp_path / "two/run")
    again = resumed(values, tmp_path / "two/run")
    assert equal(weights(second), weights(again / "model"))
    assert lines(tmp_path / "two/run") == lines(again)
    assert {name.partition(".")[0] for name in weights(second)} == {"projector", "llm"}
    logged = [line for line in lines(tmp_path / "two/run") if "loss" in line]
    assert all(line["labels"] > 0 and line["dropped"] == 0 for line in logged)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (second / name).is_file()


def test_stage1__moves_the_projector_alone(stage1: dict[str, Any], tmp_path: Path, llm_folder: Path) -> None:
    model = VisionLanguageModel.from_pretrained(train(stage1, tmp_path / "run"))
    llm = CausalModel.from_pretrained(llm_folder)
    assert model.config.language_model == str(llm_folder) and not model.config.own_tower
    assert model.config.language_fingerprint == llm.fingerprint
    assert all(torch.equal(one, llm.state_dict()[name]) for name, one in model.llm.state_dict().items())
    moved = VisionLanguageModel.from_pretrained(tmp_path / "run/checkpoints/step-00000002")
    assert not torch.equal(moved.projector.state_dict()["0.weight"], model.projector.state_dict()["0.weight"])


def test_stage2__trains_the_tower_at_its_own_rate(stage1: dict[str, Any], tmp_path: Path) -> None:
    first = train(stage1, tmp_path / "one")
    values = stage2(
        stage1, first, train=["tower", "projector", "llm"], optimizer={"lr": 1e-3, "parts": {"tower": 1e-5}}
    )
    job = job_of(values)
    rates = {group["initial_lr"] for phase in job.task.phases for one in phase.optimizers for group in one.param_groups}
    assert rates == {1e-3, 1e-5}
    second = train(values, tmp_path / "two")
    loaded = VisionLanguageModel.from_pretrained(second)
    assert loaded.config.own_tower
    before = VisionLanguageModel.from_pretrained(first).tower.state_dict()
    moved = [name for name, one in loaded.tower.state_dict().items() if not torch.equal(one, before[name])]
    assert "embeddings.patch_embedding.weight" in moved and "encoder.layers.2.self_attn.q_proj.weight" in moved
    behind = ("encoder.layers.3.", "post_layernorm.", "quant_embed")  # the layer that is read
    assert not any(name.startswith(behind) for name in moved)


def test_loss__is_the_mean_over_the_labels_of_all_micro_batches(stage1: dict[str, Any]) -> None:
    """Descriptions are longer than answers, so the mean of micro-batches' means would be another number."""
    gradients = []
    for pieces in (1, 3):
        job = job_of(stage1 | {"batch_size": 6})
        batch = job.feed.make(torch.arange(6).numpy())
        phase = job.task.phases[0]
        result = backward(phase, batch.split(pieces))
        nats = job.task.vlm(batch).detach()
        assert float(result.total) == pytest.approx(float(nats.sum()) / batch.num_labels, rel=1e-5)
        assert float(result.report["labels"]) == batch.num_labels
        gradients.append([one.grad for one in phase.parameters])
    for whole, split in zip(*gradients, strict=True):
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # starts two processes
def test_ranks__train_as_one_process_also_where_one_has_no_image(
    stage1: dict[str, Any], tmp_path: Path, llm_folder: Path
) -> None:
    items: list[dict[str, Any]] = []
    for number in range(4):
        turns = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": f"yes {number} red"}]
        items.append({"id": str(number), "conversations": turns})
        if number % 2:
            Image.new("RGB", (64, 64), (60 * number, 10, 200)).save(tmp_path / f"{number}.png")
            items[-1]["image"] = f"{number}.png"
            turns[0]["value"] = "<image>" + turns[0]["value"]
    (tmp_path / "c.json").write_text(json.dumps(items))
    data = {"conversations": str(tmp_path / "c.json"), "max_length": 64}
    values = stage1 | {"data": data, "batch_size": 2, "train": ["projector", "llm"], "checkpoint": {"export": "last"}}
    train(values, tmp_path / "one")
    kinds = ("ddp", "fsdp")
    on_ranks(2, train, [(values | {"parallel": {"kind": kind}}, tmp_path / kind) for kind in kinds])
    whole = weights(tmp_path / "one/model")
    for kind in kinds:
        found = weights(tmp_path / kind / "model")
        assert found.keys() == whole.keys()
        for name, one in found.items():
            assert torch.allclose(one, whole[name], atol=1e-5), (kind, name)


def test_batch__micro_batches_have_their_own_images(stage1: dict[str, Any]) -> None:
    batch = job_of(stage1).feed.make(torch.arange(5).numpy())
    pieces = batch.split(2)
    assert [len(piece.features) for piece in pieces] == [2, 3]
    assert torch.equal(torch.cat([piece.features for piece in pieces]), batch.features)
    assert [len(piece) for piece in batch.split(7)].count(0) == 2


def test_features__of_the_workers_are_those_of_the_model(stage1: dict[str, Any]) -> None:
    """In the precision of the frozen tower."""
    for precision in ("float32", "bfloat16"):
        job = job_of(stage1 | {"precision": precision})
        questions = [question_at("train", 0.25, number) for number in range(4)]
        pixels = torch.stack([pixels_of(one.image(), job.task.start.preprocessing) for one in questions])
        found = job.feed.make(torch.arange(4).numpy()).features
        assert torch.equal(found, job.task.vlm.image_features(pixels).float()), precision


def test_seeds__read_other_questions(stage1: dict[str, Any]) -> None:
    first, same, other = (job_of(stage1 | {"seed": seed}).feed.make(torch.arange(4).numpy()) for seed in (0, 0, 1))
    assert torch.equal(first.ids, same.ids) and torch.equal(first.features, same.features)
    assert not torch.equal(first.features, other.features)


def test_counts__descriptions_that_lose_labels_are_cut(stage1: dict[str, Any]) -> None:
    whole, short = (
        job_of(stage1 | {"data": {"questions": "train", "captions": 1.0, "max_length": length}}) for length in (128, 48)
    )
    positions = torch.arange(6).numpy()
    counts, fewer = (job.task.counts(job.feed.make(positions)) for job in (whole, short))
    rows = whole.feed.make(positions).documents >= 0
    assert counts["cut"] == 0 and 0 < fewer["cut"] == int((rows.sum(1) > 48).sum())
    assert fewer["labels"] < counts["labels"]


def test_validation__with_fsdp_is_refused_before_weights_are_loaded(
    stage1: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip.vlm.training.task.open_start", lambda *_: pytest.fail("loads weights"))
    recipe = check_recipe(stage1 | {"validation": {"every": 2}, "parallel": {"kind": "fsdp"}}, "test")
    with pytest.raises(QLIPError, match="stage1: validation answers on one rank's weights, which fsdp shards"):
        VLMKind().build(recipe, SimpleNamespace(world=2), Path())  # type: ignore[arg-type]


def test_config__own_decoder_trains_from_random_weights(stage1: dict[str, Any], tmp_path: Path) -> None:
    values = stage1 | {"train": ["projector", "llm"]}
    values["model"] = {"config": TEXT, "vocabulary": 400, "pool": 2, "template": "qa"}
    model = VisionLanguageModel.from_pretrained(train(values, tmp_path / "run"))
    assert model.config.language_model is None and model.config.text_config.vocab_size <= 400
    first, second = (line["loss"] for line in lines(tmp_path / "run") if line.get("step") in (1, 4))
    assert second < first


def test_lora__folder_has_projector_and_adapters_and_merges(
    stage1: dict[str, Any], tmp_path: Path, llm_folder: Path
) -> None:
    """The text decoder itself does not move; the adapted layers are printed; a stopped run goes on to the bit."""
    pytest.importorskip("peft", reason="peft is not installed")
    first = train(stage1, tmp_path / "one")
    values = stage2(stage1, first, lora={"rank": 2, "alpha": 4, "targets": r"layers\.\d\.attention\.(wqkv|wo)"})
    said = Console(file=io.StringIO(), width=200)
    job_of(values, console=said)
    assert "lora: 4 adapted layers: layers.0.attention.wqkv, layers.0.attention.wo" in said.file.getvalue()
    second = train(values, tmp_path / "two/run")
    assert equal(weights(second), weights(resumed(values, tmp_path / "two/run") / "model"))
    names = weights(second)
    assert {name.partition(".")[0] for name in names if ".lora_" not in name} == {"projector"}
    assert sum(".lora_" in name for name in names) == 8

    loaded, before = VisionLanguageModel.from_pretrained(second), CausalModel.from_pretrained(llm_folder).state_dict()
    moved = {name for name, one in loaded.llm.state_dict().items() if not torch.equal(one, before[name])}
    assert moved == {f"layers.{number}.attention.{name}.weight" for number in (0, 1) for name in ("wqkv", "wo")}
    assert qlip(["vlm", "merge", str(tmp_path / "two/run"), "-o", str(tmp_path / "merged")]) == 0
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert merged.config.language_model is None and merged.config.lora is None
    assert equal(merged.state_dict(), loaded.state_dict())
    with pytest.raises(QLIPError, match="matches none of the 10 linear layers in the text decoder's blocks"):
        job_of(values | {"lora": {"targets": "q_proj"}})


def test_lora__names_the_extra_without_peft(
    stage1: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(QLIPError, match=r"needs the package 'peft'"):
        job_of(stage1 | {"train": ["projector", "llm"], "lora": {}})


def test_merge__stage1_holds_its_text_decoder(
    stage1: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run that was stopped, the newest checkpoint."""
    train(stage1, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    assert qlip(["vlm", "merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"].endswith("step-00000004")
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    stopped = VisionLanguageModel.from_pretrained(tmp_path / "run/checkpoints/step-00000004")
    assert merged.config.language_model is merged.config.language_fingerprint is None and equal(
        merged.state_dict(), stopped.state_dict()
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "merged" / name).is_file()
    assert AnswerSettings.from_folder(tmp_path / "merged").single_turn  # it knows single questions alone
    assert qlip(["vlm", "merge", str(tmp_path), "-o", str(tmp_path / "none")]) == 1
    assert "holds no vision-language model" in capsys.readouterr().err


def test_recipe__what_does_not_fit_is_one_line(stage1: dict[str, Any], tmp_path: Path) -> None:
    def fault(**changes: Any) -> str:
        with pytest.raises(QLIPError) as error:
            job_of(stage1 | changes)
        return str(error.value)

    model = stage1["model"]
    assert "give one of llm" in fault(model=model | {"config": TEXT})
    assert "template 'v2': there are plain" in fault(model=model | {"template": "v2"})
    assert "random weights, which must train" in fault(model={"config": TEXT, "template": "qa"})
    assert "add llm to train" in fault(lora={})
    assert "optimizer.parts.llm is used only with train: [llm]" in fault(optimizer={"parts": {"llm": 1e-3}})
    assert "either conversations" in fault(data={})
    assert "split of questions about made scenes" in fault(data={"questions": "trian", "max_length": 64})
    data = {"questions": "train", "max_length": 600}
    assert "max_length 600: the text decoder reads 512 positions" in fault(data=data)
    llm = tmp_path / "llm"
    shutil.copytree(model["llm"], llm)
    own = {name: value for name, value in model.items() if name != "template"}
    assert "has no chat template" in (found := fault(model=own)) and "set template: to one of plain" in found
    assert "no token <|im_start|>, which the template chatml needs" in fault(model=model | {"template": "chatml"})
    assert "template is missing" in fault(model={"config": TEXT}, train=["llm"])
    (llm / "tokenizer.json").unlink()
    assert "tokenizer" in fault(model=model | {"llm": str(llm)})


def test_template__is_the_text_decoders_own(stage1: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = made("smollm2")
    CausalModel(CausalConfig.from_dict(TEXT | {"vocab_size": tokenizer.size})).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|> <|im_end|>")
    values = stage1 | {"model": {"llm": str(tmp_path), "pool": 2}}
    assert job_of(values).task.vlm.config.template == "chatml"


def test_dry_run__needs_no_weights(stage1: dict[str, Any], tmp_path: Path) -> None:
    """Of the text decoder's folder it reads config.json alone."""
    llm = tmp_path / "llm"
    llm.mkdir()
    shutil.copy(Path(stage1["model"]["llm"]) / "config.json", llm)
    values = stage1 | {"model": stage1["model"] | {"llm": str(llm)}}
    found = dry_run(check_recipe(values, "test"))  # type: ignore[arg-type]
    trained = {part.part: part.trained for part in found.parts}
    assert trained == {"projector": 768 * 32 + 32 + 32 * 32 + 32}
    assert found.memory.resident["llm"] > 0 and found.memory.resident["tower"] > 0
    assert found.units == {"tokens": 64.0, "image tokens": 16.0}
