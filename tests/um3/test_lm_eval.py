"""The adapter of lm-eval, run by lm-eval itself: stock tasks on small local files, and likelihoods against others'.

lm-eval is in the environment that `make test-lmms` sets up; ``QLIP_LMMS_PYTHON`` names its Python.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip.lm.causal import CausalModel
from qlip.lm.tokenizer import LLMTokenizer
from qlip.lm.vocabulary import train_tokenizer
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3
from tests.um3.tiny import text_config

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("QLIP_LMMS_PYTHON")
PAGE = " = Red = \n The circle is red , and the square is blue . Red is a colour @-@ word . " * 8
TASKS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "arc": (
        "arc/arc_easy.yaml",
        "test",
        [
            {
                "question": f"Which {word} is red?",
                "choices": {"text": ["the circle", "a blue square"], "label": ["A", "B"]},
                "answerKey": key,
            }
            for word, key in (("shape", "A"), ("thing", "B"), ("one", "A"))
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "validation",
        [
            {
                "ctx_a": "A circle is red.",
                "ctx_b": "the square",
                "activity_label": "Red",
                "endings": ["is blue.", "is red.", "is two.", "is left."],
                "label": "0",
            }
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "validation",
        [{"goal": "Find the circle", "sol1": "It is red.", "sol2": "It is left.", "label": 1}],
    ),
    "siqa": (
        "siqa/siqa.yaml",
        "validation",
        [
            {
                "context": "A red circle.",
                "question": "What is red?",
                "answerA": "circle",
                "answerB": "square",
                "answerC": "two",
                "label": "1",
            }
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "validation",
        [{"sentence": "The circle is red since _ is red.", "option1": "circle", "option2": "square", "answer": "1"}],
    ),
    "wikitext": ("wikitext/wikitext.yaml", "test", [{"page": PAGE}]),
}

PROGRAM = """
import json, sys
from pathlib import Path
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.api.instance import Instance
from qlip.um3.lm_eval import TextLM

work = Path(sys.argv[1])
manager = TaskManager("ERROR", include_path=str(work / "tasks"), include_defaults=False)
names = sorted(one.stem for one in (work / "tasks").glob("*.yaml"))
models = {"um3": TextLM(str(work / "um3"), device="cpu", batch_size=3),
          "qlip": TextLM(str(work / "llama"), device="cpu", batch_size=3),
          "hf": HFLM(str(work / "llama"), device="cpu", batch_size=2, dtype="float32")}
found = {}
for name, model in models.items():
    done = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    said = {task: [one["resps"] for one in samples] for task, samples in done["samples"].items()}
    ask = [Instance("generate_until", {}, ("The circle", {"until": ["."], "max_gen_toks": 6}), 0),
           Instance("generate_until", {}, ("Is the square red?", {"until": ["."], "max_gen_toks": 6}), 1)]
    found[name] = {"results": done["results"], "said": said, "texts": model.generate_until(ask)}
found["by name"] = lm_eval.simple_evaluate("qlip", model_args=f"pretrained={work / 'um3'},device=cpu",
                                           tasks=["local_arc"], task_manager=manager, bootstrap_iters=0)["results"]
(work / "found.json").write_text(json.dumps(found, default=str))
"""


def run(work: Path) -> dict[str, Any]:
    assert PYTHON is not None
    stock = subprocess.run(
        [PYTHON, "-c", "import lm_eval, pathlib; print(pathlib.Path(lm_eval.__file__).parent / 'tasks')"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (work / "tasks").mkdir()
    for name, (path, split, rows) in TASKS.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"include: {stock}/{path}", f"task: local_{name}", "dataset_path: json", "dataset_name: null"]
        lines += ["dataset_kwargs:", "  data_files:", f"    {split}: {work / name}.jsonl"]
        lines += ["training_split: null", "validation_split: null", "test_split: null", f"{split}_split: {split}"]
        (work / "tasks" / f"local_{name}.yaml").write_text("\n".join(lines) + "\n")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HOME": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [PYTHON, "-c", PROGRAM, str(work)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=work)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    return found


def save_models(work: Path) -> tuple[LLMTokenizer, UM3]:
    """Write a tiny Llama, and a UM3 whose visual rows would win any softmax that they took part in."""
    words = [PAGE, "Which shape is red? Question: Answer: Find the circle It is left. two since"]
    tokenizer = train_tokenizer(words * 3, 330, ("<boi>", "<eoi>"))
    torch.manual_seed(0)
    text = CausalModel(text_config(vocab_size=tokenizer.size, qk_norm=False))
    for one in text.parameters():
        if one.ndim > 1:
            torch.nn.init.normal_(one, std=0.3)
    text.save_pretrained(work / "llama")
    image = {"begin_image": tokenizer.token("<boi>"), "end_image": tokenizer.token("<eoi>")}
    config = UM3Config.extend(text.config, **image, group_size=3, num_groups=2, grid=(2, 3))
    um3 = UM3.grown(text, config)
    with torch.no_grad():
        um3.decoder.output_weight[config.visual_begin :] *= 50
    um3.eval().save_pretrained(work / "um3")
    for folder in ("llama", "um3"):
        tokenizer.save(work / folder)
    return tokenizer, um3


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QLIP_LMMS_PYTHON names no Python with lm-eval; run make test-lmms")
def test_lm_eval__runs_stock_tasks_and_scores_as_its_own_model_does(tmp_path: Path) -> None:
    tokenizer, um3 = save_models(tmp_path)
    found = run(tmp_path)
    for name in TASKS:
        metric = "bits_per_byte" if name == "wikitext" else "acc"
        assert found["qlip"]["results"][f"local_{name}"][f"{metric},none"] >= 0
        ours, theirs = (_numbers(found[model]["said"][f"local_{name}"]) for model in ("qlip", "hf"))
        assert ours == pytest.approx(theirs, abs=2e-4), name
        assert ours and (name == "wikitext" or len(ours) >= 2 * len(TASKS[name][2]))
    assert found["qlip"]["texts"] == found["hf"]["texts"]
    # a UM3's text has the likelihood of its text rows alone, which the text decoder's are
    for name in TASKS:
        own, text = (_numbers(found[model]["said"][f"local_{name}"]) for model in ("um3", "qlip"))
        assert own == pytest.approx(text, abs=2e-4), name
    assert found["by name"]["local_arc"] == found["um3"]["results"]["local_arc"]
    # bits per byte of a page longer than the context, window by window
    page = TASKS["wikitext"][2][0]["page"]
    reported = found["um3"]["results"]["local_wikitext"]["bits_per_byte,none"]
    (total,) = _numbers(found["um3"]["said"]["local_wikitext"])
    assert reported == pytest.approx(-total / math.log(2) / len(page.encode()), rel=1e-6)
    assert len(tokenizer.encode(page)) > um3.config.decoder.length


def _numbers(said: Any) -> list[float]:
    """All log-likelihoods in the answers of a task, which lm-eval keeps as lists of numbers or of texts."""
    if isinstance(said, list):
        return [number for one in said for number in _numbers(one)]
    if isinstance(said, bool) or said in ("True", "False"):
        return []
    return [float(said)]
