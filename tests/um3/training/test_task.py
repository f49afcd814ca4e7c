"""The task `um3`: losses by kind, controls, exact resumption in the middle of calm-down, ranks, and clear faults."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from qlip import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.processor import read_preprocessing
from qlip.training.accumulate import backward
from qlip.training.dry_run import dry_run
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.um3.batch import KINDS, Row, stack
from qlip.um3.data.config import DataSection
from qlip.um3.model import UM3
from qlip.um3.session import UM3Settings
from qlip.um3.training.task import UM3Kind
from tests.training.killed import kill_at_first_checkpoint
from tests.training.ranks import on_ranks
from tests.um3.training.conftest import train


def job_of(values: dict[str, Any]) -> Any:
    recipe = check_recipe(values, "test")
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        return UM3Kind().build(recipe, Parallel(recipe, Console(quiet=True)), Path(folder))  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    left_out = ("samples_per_s", "tokens_per_s", "data_wait", "peak_memory_gib", "seconds_left", "time")
    return [{key: value for key, value in line.items() if key not in left_out} for line in found]


START = """
from qlip.data.loader import sampler
from qlip.um3.data import mixture
from qlip.cli.main import main

sampler.BLOCK = mixture.BLOCK = 8  # two steps, so that the shares fall within the run
if __name__ == "__main__":
    main()
"""


def test_training__killed_in_the_middle_of_calm_down_resumes_to_the_bit(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 after a checkpoint, with a worker that reads ahead; the run beside it has none."""
    script, recipe = tmp_path / "start.py", tmp_path / "recipe.yaml"
    script.write_text(START)
    values |= {"schedule": {"steps": 8, "warmup": 1}, "checkpoint": {"every": 1, "keep": 10}}
    values["data"]["mixture"] |= {"calm_down_steps": 6}
    section = DataSection(**values["data"])
    assert len({section.shares(step)["text"] for step in (0, 2, 4, 6)}) == 4  # of the four blocks
    monkeypatch.setattr("qlip.data.loader.sampler.BLOCK", 8)
    monkeypatch.setattr("qlip.um3.data.mixture.BLOCK", 8)
    whole = train(values, tmp_path / "whole")
    values["data"]["num_workers"] = 1
    recipe.write_text(json.dumps(values))

    def start() -> subprocess.Popen[str]:
        arguments = [sys.executable, str(script), "train", str(recipe), "-o", str(tmp_path / "killed")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    killed = start()
    kill_at_first_checkpoint(killed, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed/model").exists()
    again = start()
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert (tmp_path / "killed/model/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_training__resumes_with_its_log_and_its_held_out_figures(values: dict[str, Any], tmp_path: Path) -> None:
    """The run as kill -9 leaves it: a checkpoint of step 2 of 4, log lines behind it, no model."""
    values["validation"] = {
        "every": 2,
        "scenes": "seen",
        "num_scenes": 2,
        "text": values["data"]["text"],
        "num_rows": 1,
    }
    whole = train(values, tmp_path / "whole")
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "checkpoints/step-00000004")
    assert (train(values, killed) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert lines(killed) == lines(tmp_path / "whole")
    logged = [line for line in lines(killed) if "loss" in line]
    for key in ("norm/text_rows", "norm/visual_rows", "norm/queries", "norm/keys", "dropped"):
        assert all(line[key] >= 0 for line in logged), key
    for key, most in (("text_bits_per_byte", 20), ("image_bits", 3000)):  # of the lines whose batch has that kind
        found = [line[key] for line in logged if key in line]
        assert len(found) >= 2 and all(0 < one < most for one in found), key
    (first, *_) = [line for line in lines(killed) if line.get("kind") == "validation"]
    assert {"caption_per_word", "caption_per_word_shuffled", "image_bits", "image_bits_shuffled"} <= {
        key.removeprefix("val/scenes seen/") for key in first
    }


def test_resume__reads_the_vocabulary_and_refuses_changed_texts(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was long. " * 400)
    values["data"] = {"length": 300, "text": [{"path": str(text)}]}
    values |= {"schedule": {"steps": 2}, "checkpoint": {"every": 1}}
    train(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    monkeypatch.setattr("qlip.um3.training.start.train_tokenizer", lambda *_: pytest.fail("trains it again"))
    train(values, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    text.write_text("The sea was cold. " * 400)
    with pytest.raises(QLIPError, match="data: the saved state has sources"):
        train(values, tmp_path / "run")


def test_export__is_a_um3_and_a_stock_qwen3(values: dict[str, Any], tmp_path: Path) -> None:
    folder = train(values | {"schedule": {"steps": 1}}, tmp_path)
    model, tokenizer = UM3.from_pretrained(folder), LLMTokenizer.from_folder(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    assert tokenizer.token("<boi>") == model.config.begin_image < model.config.text_vocab_size == tokenizer.size
    assert read_preprocessing(folder / "preprocessor_config.json", 64, 8).size == (64, 64)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(CausalModel.from_pretrained(folder)(ids), model.decoder(ids))
    assert UM3Settings.from_folder(folder).single_turn  # no row has two turns


@pytest.mark.parametrize("qk_norm", [True, False])
def test_norms__are_those_of_rows_and_of_the_layer_with_the_largest(values: dict[str, Any], qk_norm: bool) -> None:
    values["model"]["qk_norm"] = qk_norm
    task = job_of(values).task
    model = task.um3
    first, second = (layer.attention for layer in model.decoder.layers)  # 2 heads of width 16
    with torch.no_grad():
        if qk_norm:
            first.q_norm.weight.fill_(3.0)
            second.k_norm.weight.fill_(2.0)
        else:
            first.wqkv.weight[:32] *= 3.0
            second.wqkv.weight[32:64] *= 2.0
    found = {name: float(one) for name, one in task.summary().items()}
    rows, border = model.decoder.tok_embeddings.weight.detach(), model.config.visual_begin
    expected = {
        "norm/text_rows": float(torch.stack([one.norm() for one in rows[:border]]).mean()),
        "norm/visual_rows": float(torch.stack([one.norm() for one in rows[border:]]).mean()),
    }
    if qk_norm:  # the root mean square of a query is the norm's weight, in each of 16 channels
        expected |= {"norm/queries": 3.0 * 16**0.5, "norm/keys": 2.0 * 16**0.5}
    else:  # of white inputs: the mean square over heads of the projection's norm
        with torch.no_grad():
            white = torch.randn(100_000, 32)
            queries, keys = white @ first.wqkv.weight[:32].T, white @ second.wqkv.weight[32:64].T
            expected |= {
                name: float(one.unflatten(1, (2, 16)).square().sum(2).mean().sqrt())
                for name, one in (("norm/queries", queries), ("norm/keys", keys))
            }
    assert found == pytest.approx(expected, rel=1e-5 if qk_norm else 0.02)


@pytest.mark.slow
def test_compile__gives_the_same_losses(values: dict[str, Any], tmp_path: Path) -> None:
    train(values, tmp_path / "plain")
    train(values | {"compile": True}, tmp_path / "compiled")
    plain, compiled = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_start__visual_rows_at_the_mean_lose_exactly_their_number_of_bits(values: dict[str, Any]) -> None:
    """The first loss of an image is 64 tokens x 28 bits, to float32's precision."""
    values["model"] |= {"rows": "shared", "row_start": "mean"}
    job = job_of(values)
    row = Row("text-to-image", [drawing(job.task)])
    batch = stack([row], 300)
    report = job.task.loss(job.task.forward(batch, False))[1]
    assert float(report["image_bits"]) == pytest.approx(64 * 28, rel=1e-6)


def drawing(task: Any, text: str = "a red circle") -> torch.Tensor:
    """Document of an image of random tokens."""
    config = task.um3.config
    ids = task.start.tokenizer.encode(text)
    values = torch.randint(0, 128, (64, 4), generator=torch.Generator().manual_seed(0))
    offsets = 0 if config.rows == "shared" else 128 * torch.arange(4)
    image = (values + offsets + config.visual_begin).flatten()
    return torch.tensor([*ids, config.begin_image, *image.tolist(), config.end_image, task.start.tokenizer.eos])


def test_figures__are_those_of_the_logits(values: dict[str, Any]) -> None:
    """One row of each kind, against a softmax over the rows of each target's own kind."""
    job = job_of(values)
    task, tokenizer, config = job.task, job.task.start.tokenizer, job.task.um3.config
    text = torch.tensor([*tokenizer.encode("The sea was long."), tokenizer.eos])
    image = drawing(task)
    begin = int((image == config.begin_image).nonzero()[0, 0])
    caption = torch.cat([image[begin:-1], torch.tensor([*tokenizer.encode("a red circle"), tokenizer.eos])])
    documents = {"text": text, "image-to-text": caption, "text-to-image": image}
    report = task.loss(task.forward(stack([Row(kind, [one]) for kind, one in documents.items()], 300), False))[1]  # type: ignore[arg-type]

    def nats(ids: torch.Tensor) -> tuple[float, float, int]:
        """Of text and of visual targets, and the number of text targets."""
        logits, border = task.um3.decoder(ids[None])[0].detach(), config.visual_begin
        of_text, of_image, count = 0.0, 0.0, 0
        for place, target in enumerate(ids.tolist()[1:]):
            if target < border:
                of_text += float(F.cross_entropy(logits[place, :border][None], torch.tensor([target])))
                count += 1
            else:
                first = border + (target - border) // 128 * 128
                group = logits[place, first : first + 128][None]
                of_image += float(F.cross_entropy(group, torch.tensor([target - first])))
        return of_text, of_image, count

    whole, _, _ = nats(text)
    size = len("The sea was long.") - len(tokenizer.token_texts()[int(text[0])])  # the first id is no target
    assert float(report["text_bits_per_byte"]) == pytest.approx(whole / size / math.log(2), rel=1e-4)
    words, bits, count = nats(caption)
    _, drawn, _ = nats(image)
    words_alone = words - _end_of_image(task, caption)
    assert float(report["caption_per_word"]) == pytest.approx(words_alone / 3, rel=1e-4)
    assert float(report["caption"]) == pytest.approx(words_alone / (count - 1), rel=1e-4)
    assert float(report["described_image_bits"]) == pytest.approx(bits / math.log(2), rel=1e-4)
    assert float(report["image_bits"]) == pytest.approx(drawn / math.log(2), rel=1e-4)


def _end_of_image(task: Any, ids: torch.Tensor) -> float:
    """Nats of the end of an image, which the grammar forces."""
    logits, end = task.um3.decoder(ids[None])[0].detach(), task.um3.config.end_image
    place = int((ids == end).nonzero()[0, 0])
    return float(F.cross_entropy(logits[place - 1, : task.um3.config.visual_begin][None], ids[place : place + 1]))


def test_loss__is_the_weighted_mean_over_targets_of_all_micro_batches(values: dict[str, Any]) -> None:
    gradients = []
    for pieces in (1, 3):
        job = job_of(values | {"batch_size": 6})
        batch = next(iter(job.feed.open(None)))[0]
        result = backward(job.task.phases[0], batch.split(pieces))
        types = job.task.um3.grammar.target_types(batch.ids, batch.documents)
        behind = (batch.kinds == KINDS.index("image-to-text")) & (batch.ids != job.task.um3.config.end_image)
        weight = (types == 0) * (1 + 2 * behind) + 0.5 * (types > 0)
        wanted = float((job.task.um3(batch).detach() * weight).sum() / weight.sum())
        assert float(result.losses["nats"]) == pytest.approx(wanted, rel=1e-5)
        gradients.append([one.grad for one in job.task.phases[0].parameters])
    for whole, split in zip(*gradients, strict=True):
        assert torch.allclose(whole, split, rtol=1e-3, atol=1e-6)


def test_shares__follow_the_calm_down(values: dict[str, Any]) -> None:
    """Text falls from 4 of 6 rows to 1 of 3 over the steps; blocks of positions have exact shares."""
    values |= {"batch_size": 500, "schedule": {"steps": 8, "warmup": 1}}
    weights = job_of(values).feed.make.weights
    shares = [weights(block)[0] for block in range(3)]  # steps 0, 2, 4
    assert shares == pytest.approx([4 / 6, 2.5 / 4.5, 1 / 3])


@pytest.mark.slow  # starts two processes
def test_ranks__ddp_and_fsdp_equal_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    """Norms are whole ones where weights are sharded; validation runs on all ranks."""
    values["validation"] = {"every": 2, "scenes": "seen", "num_scenes": 2}
    values["micro_batch_size"] = 1
    train(values, tmp_path / "one")
    kinds = ("ddp", "fsdp")
    on_ranks(2, train, [(values | {"parallel": {"kind": kind}}, tmp_path / kind) for kind in kinds])
    expected = load_file(tmp_path / "one/model/model.safetensors")
    for kind in kinds:
        for name, tensor in load_file(tmp_path / kind / "model/model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=f"{kind}: {name}")
        for line, other in zip(lines(tmp_path / kind), lines(tmp_path / "one"), strict=True):
            assert line.pop("kind", None) == other.get("kind")
            assert line == pytest.approx({key: one for key, one in other.items() if key != "kind"}, rel=1e-3), kind


def test_activation_checkpointing__gives_the_same_step(values: dict[str, Any], tmp_path: Path) -> None:
    plain = train(values | {"schedule": {"steps": 1}}, tmp_path / "plain")
    other = train(values | {"schedule": {"steps": 1}, "activation_checkpointing": True}, tmp_path / "other")
    for name, one in load_file(plain / "model.safetensors").items():
        torch.testing.assert_close(one, load_file(other / "model.safetensors")[name])


def test_empty_share__of_a_rank_keeps_the_gradients(values: dict[str, Any]) -> None:
    task = job_of(values).task
    batch = stack([Row("text", [drawing(task)[:4]])], 300)
    sums = task.sums(next(piece for piece in batch.split(2) if not len(piece)))
    assert all(float(one.detach()) == 0 and one.requires_grad for one in sums.values())


def test_dry_run__needs_no_data(values: dict[str, Any]) -> None:
    values["data"]["text"] = [{"path": "nowhere.jsonl"}]
    found = dry_run(check_recipe(values, "test"))  # type: ignore[arg-type]
    assert found.units == {"tokens": 300.0}
    rows = 32 * (320 + 4 * 128)
    block = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16
    assert [part.trained for part in found.parts] == [rows + 2 * block + 32]


def test_faults__are_one_clear_line(values: dict[str, Any], tmp_path: Path) -> None:
    def fault(**changes: Any) -> str:
        with pytest.raises(QLIPError) as caught:
            job_of(values | changes)
        return str(caught.value)

    model, data = values["model"], values["data"]
    assert "give one of llm (a text decoder's folder), config (sizes) and init" in fault(model={})
    assert "image_tokens is used only with llm or tokenizer" in fault(model=model | {"image_tokens": ["<a>", "<b>"]})
    assert "config.qk_norm follows from" in fault(model=model | {"config": {**model["config"], "qk_norm": True}})
    assert "group_size 5 does not divide 28 bits, a token of bundled" in fault(model=model | {"group_size": 5})
    assert "data.length 600: the decoder reads 512 positions" in fault(data=data | {"length": 600})
    assert "length 200" in fault(data=data | {"length": 200})
    assert "ratios" in fault(data=data | {"mixture": {"text": [0, 0], "image_to_text": 0, "text_to_image": 0}})
    assert "nothing to measure" in fault(validation={"every": 2})
    assert "sene" in fault(data=data | {"images": [{"scenes": "sene"}]})
    (tmp_path / "llm").mkdir()
    assert "config.json" in fault(model={"llm": str(tmp_path / "llm")})
