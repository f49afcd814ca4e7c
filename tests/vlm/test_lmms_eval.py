"""The plugin run by lmms-eval itself: stock tasks on small local tables, and the tasks about made scenes.

lmms-eval has an environment of its own, which `make test-lmms` sets up; ``QLIP_LMMS_PYTHON`` names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("QLIP_LMMS_PYTHON")

PROGRAM = """
import json, sys
from pathlib import Path
import datasets, lmms_eval
from PIL import Image
from lmms_eval import evaluator, models
from lmms_eval.tasks import TaskManager
from qlip.vlm import lmms
from qlip.vlm.lmms import scenes

model, work = sys.argv[1], Path(sys.argv[2])
models.MODEL_REGISTRY_V2.register_manifest(lmms.manifest(), overwrite=True)
red, stock = Image.new("RGB", (64, 64), "red"), Path(lmms_eval.__file__).parent / "tasks"
ten = [{"answer": "red", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
mme = [{"question_id": "1", "question": "Red? Please answer yes or no.", "category": "color"} | {"answer": one}
       for one in ("Yes", "No")]
tables = {
    "pope": ("pope/pope.yaml", "test", [{"question_id": "1", "question": "Is there a cat?", "answer": "no"}]),
    "mme": ("mme/mme.yaml", "test", mme),
    "textvqa": ("textvqa/textvqa_val.yaml", "validation",
        [{"question_id": 1, "question": "what colour?", "answers": ["red"] * 10, "answer": "red", "ocr_tokens": []}]),
    "vqav2": ("vqav2/vqav2_val.yaml", "validation",
        [{"question_id": 1, "question": "what colour?", "answers": ten, "answer": "red"}]),
    "gqa": ("gqa/gqa.yaml", "testdev", [{"id": "1", "imageId": "7", "question": "What colour?", "answer": "red"}]),
}
(work / "tasks").mkdir()
for name, (path, split, rows) in tables.items():
    rows = [row if name == "gqa" else row | {"image": red} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(str(work / f"{name}.parquet"))
    lines = [f"include: {stock / path}", f"task: local_{name}", "dataset_path: parquet", "dataset_name: null"]
    lines += ["dataset_kwargs:", "  data_files:", f"    {split}: {work / name}.parquet"]
    if name == "gqa":  # its own function fetches the images
        lines += ["process_docs: !function local.with_images"]
    (work / "tasks" / f"{name}.yaml").write_text("\\n".join(lines) + "\\n")
(work / "tasks" / "local.py").write_text('''
from PIL import Image
def with_images(dataset):
    return dataset.map(lambda row: {"image": Image.new("RGB", (64, 64), "red")})
''')
scenes.PER_KIND = 2
manager = TaskManager("ERROR", include_path=[str(work / "tasks"), str(lmms.TASKS)], include_defaults=False,
                      model_name="qlip")
names = [*(f"local_{name}" for name in tables), "qlip_scenes"]
found = evaluator.simple_evaluate("qlip", model_args=f"pretrained={model},device=cpu", tasks=names,
                                  task_manager=manager, batch_size=4, bootstrap_iters=0)
answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
(work / "found.json").write_text(json.dumps({"results": found["results"], "answers": answers}, default=str))
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QLIP_LMMS_PYTHON names no Python with lmms-eval; run make test-lmms")
def test_lmms_eval__runs_stock_tasks_and_ours(talker_folder: Path, tmp_path: Path) -> None:
    assert PYTHON is not None
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [PYTHON, "-c", PROGRAM, str(talker_folder), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    results: dict[str, Any] = found["results"]
    for task, metric in {
        "local_pope": "pope_accuracy",
        "local_mme": "mme_perception_score",
        "local_textvqa": "exact_match",
        "local_vqav2": "exact_match",
        "local_gqa": "exact_match",
        "qlip_scenes_seen": "right",
        "qlip_scenes_unseen_pair_blind": "right_relation",
        "qlip_scenes_unseen_pair_shuffled": "right_colour",
    }.items():
        assert 0 <= results[task][f"{metric},none"] <= 100, task
    assert len(found["answers"]["qlip_scenes_seen"]) == 14
    seen, blind = (found["answers"][f"qlip_scenes_seen{kind}"] for kind in ("", "_blind"))
    assert seen != blind
