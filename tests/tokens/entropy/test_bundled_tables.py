"""The bundled model's entropy tables: its own, small, and a saving on the demo images."""

from __future__ import annotations

import torch
from safetensors import safe_open

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.tokens import TokenCodecs, pack_batch
from qlip.tokens.entropy.tables import FILE


def test_bundled_tables__shorten_the_demo_images() -> None:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    path = assets.path(assets.BUNDLED, FILE)
    assert path.stat().st_size < 300_000
    with safe_open(path, framework="np") as file:
        assert file.metadata()["code_fingerprint"] == model.code_fingerprint
    codec = TokenCodecs.of_model("bundled").current
    assert codec is not None and codec.num_bits == model.num_bits
    photographs = sorted(assets.path("images").glob("*.jpg"))
    drawings = sorted(assets.path("images", "drawings").glob("*.png"))
    for images, saved in ((photographs, 0.1), (drawings, 0.25)):
        with torch.inference_mode():
            packed = pack_batch(model.encode(processor(images=list(images))["pixel_values"]), model.group_size)
        coded = codec.encode(packed, model.grid)
        assert codec.decode(coded, model.grid) == packed
        assert sum(map(len, coded)) < (1 - saved) * sum(map(len, packed))
