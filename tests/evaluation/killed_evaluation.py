"""A measurement to be killed: ``python -m tests.evaluation.killed_evaluation IMAGES WORK``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run import evaluate_dataset as passes
from tests.evaluation.test_evaluate_dataset import Brightness, opened

if __name__ == "__main__":
    passes.CHUNK = 4
    network, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    model = QLIPEvalModel(network, processor, assets.BUNDLED)
    data = opened(Path(sys.argv[1]), model)
    found = passes.evaluate_dataset(model, data, [Brightness()], folder=Path(sys.argv[2]), batch_size=3)
    assert found is not None
    rebuilt = found.metric_results["brightness"].values["rebuilt"].value
    print(json.dumps({"count": found.count, "digest": found.digest, "rebuilt": rebuilt}))
