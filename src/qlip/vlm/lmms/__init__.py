"""Plugin of lmms-eval: the model `qlip`, found by entry point, and tasks about made scenes.

    lmms-eval --model qlip --model_args pretrained=FOLDER --batch_size 16 --tasks pope
    lmms-eval ... --tasks qlip_scenes --include_path "$(python -c 'from qlip.vlm import lmms; print(lmms.TASKS)')"

`manifest` names the model to lmms-eval, and `qlip.vlm.lmms.model` holds its class, which only lmms-eval imports.
`TASKS` is the folder of the tasks, whose functions are in `qlip.vlm.lmms.scenes`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""Folder for lmms-eval's ``--include_path``."""
NAME = "qlip"
"""Name for lmms-eval's ``--model``."""


def manifest() -> Any:
    """Return lmms-eval's ``ModelManifest`` of the model; lmms-eval calls this by the entry point."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")  # part of what calls this
    return registry.ModelManifest(model_id=NAME, chat_class_path="qlip.vlm.lmms.model.QLIPVision")
